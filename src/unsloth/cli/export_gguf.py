"""`unsloth export --format gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.export import load_further
from unsloth.cli.options import precision_switch
from unsloth.core.errors import ConfigError
from unsloth.export import upload
from unsloth.export.gguf import forecast, save
from unsloth.export.merge import MergeOptions
from unsloth.models import source
from unsloth.train.estimate import format_bytes


@dataclass(frozen=True)
class GgufOptions:
    """What to export as GGUF, and how.

    Attributes:
        name: Folder, adapter folder or hub id.
        out: The folder to write.
        methods: Names of quantization methods; a file each.
        imatrix: An importance matrix.
        data: File of rows on which the importance of inputs is measured.
        adapter_only: Write the adapter alone, to be loaded beside a file of the base model.
        precision: How to hold the base, as in ``unsloth export``.
        adapter_scale: Factor on the adapter's alpha.
        base_weight: Share of the base model in an average of the weights.
        further: Further adapters as ``FOLDER=WEIGHT``.
        max_shard_size: Largest file; None writes one file a method.
        maximum_memory_usage: Share of the free memory that llama.cpp may take.
        push_to: Repository to upload the folder to.
        public: Whether a repository that is made is to be public.
        trust_remote_code: Whether the model's repository may run code.
    """

    name: str
    out: str
    methods: Sequence[str] = ("fast_quantized",)
    imatrix: str | None = None
    data: str | None = None
    adapter_only: bool = False
    precision: str | None = None
    adapter_scale: float = 1.0
    base_weight: float = 0.0
    further: Sequence[str] = ()
    max_shard_size: str | None = None
    maximum_memory_usage: float = 0.75
    push_to: str | None = None
    public: bool = False
    trust_remote_code: bool = False


def dry_run(options: GgufOptions) -> None:
    """Print what would be written, and whether there is room for it. Loads no weights, writes nothing.

    Raises:
        UnslothError: The configuration cannot be read, or llama.cpp does not have the architecture.
    """
    if options.adapter_only:
        raise ConfigError("--dry-run does not tell the size of an adapter's file", do="Leave out --method lora.")
    plan = forecast.of_model(options.name, options.out, options.methods, trust_remote_code=options.trust_remote_code)
    rows = {file.method: _description(file, options) for file in plan.files}
    rows["while they are made"] = f"{format_bytes(plan.conversion)} for the unquantized weights"
    rows["free on the disk"] = format_bytes(plan.free)
    if options.push_to:
        rows["upload to"] = f"{options.push_to}{'' if options.public else ', private if it is made'}"
    screen.console().print(screen.facts(f"Would be written to {options.out}", rows))
    if not plan.fits:
        screen.console().print("There is not enough room on the disk.")


def _description(file: forecast.File, options: GgufOptions) -> str:
    parts = [format_bytes(file.nbytes)]
    if file.replaced:
        parts.append(f"{file.replaced} tensors in another type, whose blocks divide their rows")
    if file.matrix and options.imatrix is None:
        parts.append(f"with an importance matrix measured on {options.data or 'conversations that ship'}")
    return ", ".join(parts)


def export(options: GgufOptions) -> None:
    """Load a model, write it as GGUF, say what was found, and upload it if asked.

    Raises:
        UnslothError: The model cannot be loaded, written or uploaded.
    """
    console = screen.console()
    save.wanted_methods(options.methods, "bf16")  # before anything is loaded
    save.shard_bytes(options.max_shard_size)
    MergeOptions(None, options.adapter_scale, options.base_weight)
    repository = None
    if options.push_to:
        repository = upload.prepare(options.push_to, private=not options.public)
    has_adapter = source.resolve(options.name, weights=False).adapter_base is not None
    switch = precision_switch(options.precision or ("4bit" if has_adapter else "16bit"))
    model: Any
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.name, **switch, trust_remote_code=options.trust_remote_code
    )
    wanted = save.Options(
        methods=options.methods,
        imatrix_file=options.imatrix,
        calibration_data=options.data,
        maximum_memory_usage=options.maximum_memory_usage,
        max_shard_size=options.max_shard_size,
        merge=MergeOptions(load_further(model, options.further), options.adapter_scale, options.base_weight),
    )
    if options.adapter_only:
        saved = save.save_adapter(model, options.out, tokenizer, wanted)
    else:
        saved = save.save(model, options.out, tokenizer, wanted)[0]
    for each in saved:
        console.print(f"{each.files[0]}: {each.proof}", markup=False)
        for sentence in each.proof.not_checked:
            console.print(f"Note: {sentence}.", markup=False)
    console.print(f"Written to {options.out}", markup=False)
    if repository is not None:
        console.print(f"Uploaded to {upload.upload(Path(options.out), repository)}", markup=False)
