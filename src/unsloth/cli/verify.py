"""`unsloth verify`: whether a saved model is the one it is said to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.api import FastLanguageModel
from unsloth.cli import screen
from unsloth.cli.options import precision_switch
from unsloth.core import artifact
from unsloth.core.errors import AdapterError, ModelNotFoundError
from unsloth.export import audit
from unsloth.models import source


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared with what.

    Attributes:
        target: A folder of transformers' format, a folder of GGUF files, or a GGUF file.
        against: The original: a folder or hub id.
        adapter: An adapter's folder on it; None if the original is a whole model.
        precision: How to hold the original; None means as it was held when it was saved, where that is known.
        trust_remote_code: Whether the original's repository may run code.
    """

    target: str
    against: str
    adapter: str | None = None
    precision: str | None = None
    trust_remote_code: bool = False


def verify(options: VerifyOptions) -> bool:
    """Print what was compared and what differs, each in a sentence; whether all is well.

    Raises:
        UnslothError: Something cannot be loaded.
    """
    target = Path(options.target).expanduser()
    files = _files(target)
    name = options.against if options.adapter is None else options.adapter
    if options.adapter is not None:
        _check_base(options.adapter, options.against)
    precision = options.precision or _held_in(target) or ("4bit" if options.adapter else "16bit")
    switch = precision_switch(precision)
    model: Any
    model, tokenizer = FastLanguageModel.from_pretrained(name, **switch, trust_remote_code=options.trust_remote_code)
    model.eval()
    console = screen.console()
    well = True
    for file in files:
        found = (audit.of_folder if file.is_dir() else audit.of_gguf)(file, model, tokenizer)
        console.print(file.name, style="bold", markup=False)
        for label, sentences in (("alike", found.passed), ("note", found.notes), ("PROBLEM", found.problems)):
            for sentence in sentences:
                console.print(f"  {label}: {sentence}", markup=False)
        if found.answer is not None:
            console.print(f"  greedy answer through the chat template: the same at {found.answer:.0%} of its tokens")
        well = well and not found.problems
    damaged = artifact.verify(target) if (target / artifact.MANIFEST).is_file() else []
    for sentence in damaged:
        console.print(f"PROBLEM: {sentence}", markup=False)
    console.print("Everything that was compared is alike." if well and not damaged else "This is not the model.")
    return well and not damaged


def _held_in(target: Path) -> str | None:
    """How the base was held when the model was saved, by what the save left beside it."""
    folder = target if target.is_dir() else target.parent
    manifest = artifact.read_manifest(folder)
    details = manifest["details"] if manifest is not None else {}
    reports = [details, *details.get("files", {}).values()]
    held = next((report["base_held_in"] for report in reports if "base_held_in" in report), None)
    return held if held in ("4bit", "8bit", "16bit") else None


def _files(target: Path) -> list[Path]:
    """What there is to verify: the folder itself, or GGUF files, of split ones the first."""
    if target.is_dir() and not (target / "config.json").is_file():
        found = sorted(
            path for path in target.glob("*.gguf") if not _is_later_shard(path) and ".lora." not in path.name
        )
        if not found:
            raise ModelNotFoundError("neither a model nor a GGUF file in this folder", got=str(target))
        return found
    if not target.exists():
        raise ModelNotFoundError("no such folder or file", got=str(target))
    return [target]


def _is_later_shard(path: Path) -> bool:
    number = path.stem.rpartition("-of-")[0].rpartition("-")[2]
    return "-of-" in path.stem and number.isdigit() and int(number) > 1


def _check_base(adapter: str, base: str) -> None:
    """Raise :class:`AdapterError` if the adapter says that it belongs to another model."""
    of = source.resolve(adapter, weights=False).adapter_base
    if of is None:
        raise AdapterError("--adapter names a folder without an adapter", got=adapter)
    if of != base and Path(of).expanduser().resolve() != Path(base).expanduser().resolve():
        raise AdapterError(
            f"wrong base: the adapter in {adapter} was trained on '{of}'", got=base, do=f"Pass --against {of}."
        )
