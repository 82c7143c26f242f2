"""The model card of a folder of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unsloth.core import artifact
from unsloth.export.card import rows

NAME = "README.md"


def may_be_written(folder: Path) -> bool:
    """Whether the folder has no card of the user's own."""
    if not (folder / NAME).exists():
        return True
    manifest = artifact.read_manifest(folder)
    return manifest is not None and any(record.name == NAME for record in manifest["files"])


def text(is_public: bool, model: torch.nn.Module, made_of: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The card's Markdown.

    Args:
        is_public: Whether the base's name is a hub id.
        model: What the newest of the files were made from.
        made_of: Its base and adapters.
        files: What the manifest says of each file.
    """
    base = made_of["base"]
    lines = ["---", *([f"base_model: {base}"] if is_public else []), "library_name: gguf", "tags:", "- unsloth"]
    lines += ["---", "", f"# A fine-tuned {base} as GGUF", "", *rows(model, made_of), ""]
    lines += ["| file | types | against the model |", "|---|---|---|"]
    for name, report in sorted(files.items()):
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(report["types"].items(), key=lambda t: -t[1]))
        found = report["comparison"]
        compared = (
            f"KL divergence {found['mean_kl']:.1e} nats in the mean, same next token at {found['top1_agreement']:.1%}"
            f" of {found['tokens']} positions ({report['engine']})"
            if found
            else "not run"
        )
        lines.append(f"| {name} | {types} | {compared} |")
    return "\n".join([*lines, "", "Trained and exported with unsloth; `Modelfile` is for Ollama.", ""])
