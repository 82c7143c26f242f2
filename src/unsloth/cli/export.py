"""`unsloth export`: a model or adapter in another form."""

from __future__ import annotations

from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.options import precision_switch
from unsloth.models import source


def export(name: str, out: str, *, method: str, precision: str | None = None, trust_remote_code: bool = False) -> None:
    """Load a model and write it to ``out``.

    An adapter is merged into its base model held in 4 bits, as the library trains by default; a model without an
    adapter is loaded in 16 bits, so that nothing is lost. ``precision`` overrides both.

    Args:
        name: Folder, adapter folder or hub id.
        out: The folder to write.
        method: As in ``save_pretrained_merged``.
        precision: ``"4bit"``, ``"8bit"`` or ``"16bit"``.
        trust_remote_code: Whether the model's repository may run code.

    Raises:
        UnslothError: The model cannot be loaded or written.
    """
    console = screen.console()
    has_adapter = source.resolve(name).adapter_base is not None
    switch = precision_switch(precision or ("4bit" if has_adapter else "16bit"))
    model, tokenizer = FastLanguageModel.from_pretrained(name, **switch, trust_remote_code=trust_remote_code)
    exporter: Any = model
    comparison = exporter.save_pretrained_merged(out, tokenizer, save_method=method)
    if comparison is not None:
        console.print(f"Loaded again with plain transformers: {comparison}.")
    console.print(f"Written to {out}", markup=False)
