"""`unsloth export`: a model or adapter in another form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.options import precision_switch
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.export import forecast, save, upload
from unsloth.models import saved_adapter, source
from unsloth.train.estimate import format_bytes


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        name: Folder, adapter folder or hub id.
        out: The folder to write.
        method: As in ``save_pretrained_merged``.
        precision: How to hold the base: ``"4bit"``, ``"8bit"`` or ``"16bit"``; None means 4 bits for an adapter, as the
            library trains by default, and 16 bits for a model without one, so that nothing is lost.
        adapter_scale: Factor on the adapter's alpha.
        base_weight: Share of the base model in an average of the weights.
        further: Further adapters as ``FOLDER=WEIGHT``.
        max_shard_size: Largest weight file.
        maximum_memory_usage: Share of the free memory that the reloaded model may take.
        push_to: Repository to upload the folder to.
        public: Whether a repository that is made is to be public.
        trust_remote_code: Whether the model's repository may run code.
    """

    name: str
    out: str
    method: str = "merged_16bit"
    precision: str | None = None
    adapter_scale: float = 1.0
    base_weight: float = 0.0
    further: Sequence[str] = ()
    max_shard_size: str = "5GB"
    maximum_memory_usage: float = 0.75
    push_to: str | None = None
    public: bool = False
    trust_remote_code: bool = False


def dry_run(options: ExportOptions) -> None:
    """Print what would be written, and whether there is room for it. Loads no weights, writes nothing.

    Raises:
        UnslothError: The configuration cannot be read.
    """
    plan = forecast.forecast(
        options.name,
        options.out,
        options.method,
        max_shard_size=options.max_shard_size,
        trust_remote_code=options.trust_remote_code,
    )
    rows = {
        "base": plan.base,
        "method": plan.method,
        "weights": f"{format_bytes(plan.nbytes)} in {plan.files} file{'s' if plan.files > 1 else ''}, "
        f"{plan.tensors} tensors",
        "free on the disk": format_bytes(plan.free),
    }
    if options.push_to:
        rows["upload to"] = f"{options.push_to}{'' if options.public else ', private if it is made'}"
    screen.console().print(screen.facts(f"Would be written to {options.out}", rows))
    if not plan.fits:
        screen.console().print("There is not enough room on the disk.")


def export(options: ExportOptions) -> None:
    """Load a model, write it in the form asked for, and upload it if asked.

    Raises:
        UnslothError: The model cannot be loaded, written or uploaded.
    """
    console = screen.console()
    save.check_method(options.method)
    repository = None
    if options.push_to:
        repository = upload.prepare(options.push_to, private=not options.public)
    has_adapter = source.resolve(options.name, weights=False).adapter_base is not None
    switch = precision_switch(options.precision or ("4bit" if has_adapter else "16bit"))
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.name, **switch, trust_remote_code=options.trust_remote_code
    )
    exporter: Any = model
    comparison = exporter.save_pretrained_merged(
        options.out,
        tokenizer,
        save_method=options.method,
        adapter_scale=options.adapter_scale,
        base_weight=options.base_weight,
        adapters=load_further(model, options.further),
        max_shard_size=options.max_shard_size,
        maximum_memory_usage=options.maximum_memory_usage,
    )
    if comparison is not None:
        console.print(f"Loaded again with plain transformers: {comparison}.")
    console.print(f"Written to {options.out}", markup=False)
    if repository is not None:
        console.print(f"Uploaded to {upload.upload(Path(options.out), repository)}", markup=False)


def load_further(model: Any, further: Sequence[str]) -> dict[str, float] | None:
    """Load further adapters, given as ``FOLDER=WEIGHT``, beside the first; return the weight of each by name.

    Returns:
        None if there are none.

    Raises:
        AdapterError: The model is no adapter, or one of the others is on another base.
        ConfigError: Not a weight.
    """
    if not further:
        return None
    if not hasattr(model, "peft_config"):
        raise AdapterError("--with adds adapters to an adapter", do="Name an adapter's folder as MODEL.")
    weights = dict.fromkeys(model.peft_config, 1.0)
    for number, entry in enumerate(further, start=1):
        folder, _, weight = entry.rpartition("=") if "=" in entry else (entry, "", "1")
        try:
            weights[f"with_{number}"] = float(weight)
        except ValueError as error:
            raise ConfigError(
                "--with takes FOLDER=WEIGHT", got=entry, do="For example --with my_adapter=0.5."
            ) from error
        saved_adapter.add(model, source.resolve(folder), f"with_{number}")
    return weights
