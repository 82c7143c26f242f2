"""`unsloth imatrix`: what matters in a model, for quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.options import precision_switch
from unsloth.export import imatrix as matrix
from unsloth.models import source


@dataclass(frozen=True)
class ImatrixOptions:
    """What to measure, and where to write it.

    Attributes:
        name: Folder, adapter folder or hub id.
        out: The file to write.
        data: File, folder or data set of rows; None takes the conversations that ship with the library.
        tokens: The most tokens to take of them.
        precision: How to hold the base, as in ``unsloth export``.
        trust_remote_code: Whether the model's repository may run code.
    """

    name: str
    out: str
    data: str | None = None
    tokens: int = 16_384
    precision: str | None = None
    trust_remote_code: bool = False


def imatrix(options: ImatrixOptions) -> None:
    """Load a model, run it over the rows, and write the file.

    Raises:
        UnslothError: The model cannot be loaded, the rows cannot be used, or the file cannot be written.
    """
    matrix.check_suffix(options.out)  # before anything is loaded
    has_adapter = source.resolve(options.name, weights=False).adapter_base is not None
    switch = precision_switch(options.precision or ("4bit" if has_adapter else "16bit"))
    model: Any
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.name, **switch, trust_remote_code=options.trust_remote_code
    )
    model.save_imatrix(options.out, tokenizer, options.data, tokens=options.tokens)
    screen.console().print(f"Written to {options.out}", markup=False)
