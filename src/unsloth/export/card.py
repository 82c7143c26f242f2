"""The model card of a saved model: what it was made of, how, and what was checked. It names no local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from unsloth.models import trained

NAME = "README.md"
_POINTS = 6  # of a loss


def write(folder: Path, model: torch.nn.Module, report: Mapping[str, Any]) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        folder: The saved model.
        model: What it was made from.
        report: What the export did and found (``unsloth_export.json``); of an adapter, what it is made of.
    """
    (folder / NAME).write_text(text(model, report), encoding="utf-8")


def text(model: torch.nn.Module, report: Mapping[str, Any]) -> str:
    """The card's Markdown."""
    base, is_public = public_name(str(report["base"]))
    lines = ["---"]
    if is_public:
        lines.append(f"base_model: {base}")
    library = "transformers" if "method" in report else "peft"
    lines += [f"library_name: {library}", "tags:", "- unsloth", "---", "", f"# A fine-tuned {base}", ""]
    lines += rows(model, report)
    comparison = report.get("comparison")
    if comparison:
        lines += [
            "",
            "Before it got its name, this folder was loaded with plain transformers and compared with the model that "
            f"was trained: the same next token at {comparison['top1_agreement']:.1%} of {comparison['tokens']} "
            f"positions, and a Kullback-Leibler divergence of {comparison['median_kl']:.1e} nats in the median. "
            f"{report['layers_checked']} adapted layers were compared one by one.",
        ]
    return "\n".join(lines) + "\n"


def rows(model: torch.nn.Module, report: Mapping[str, Any]) -> list[str]:
    """A table of what the model was made of, and how its last run in this process went."""
    lines = [
        "| | |",
        "|---|---|",
        f"| base | {public_name(str(report['base']))[0]}, held in {report['base_held_in']} |",
    ]
    if "method" in report:
        lines.append(f"| weights | {report['method']}, {report['dtype']} |")
    lines += _adapter_rows(model, report)
    run = trained.find(model)
    if run is not None:
        data = "" if run.rows is None else f" on {run.rows:,} rows"
        lines.append(
            f"| training | {run.method}, {run.steps} steps of {run.batch_size} rows, {run.epochs} epochs{data} |"
        )
        lines.append(f"| optimizer | {run.optimizer}, learning rate {run.learning_rate:g} |")
        lines += _losses("training", run.losses) + _losses("held-out", run.held_out)
    return lines


def _losses(name: str, logged: Sequence[tuple[int, float]]) -> list[str]:
    """A table row with the course of a loss, in a few points from the first to the last."""
    count = min(len(logged), _POINTS)
    chosen = [logged[round(index * (len(logged) - 1) / max(count - 1, 1))] for index in range(count)]
    course = ", ".join(f"{loss:.3f} (step {step})" for step, loss in chosen)
    return [f"| {name} loss | {course} |"] if chosen else []


def _adapter_rows(model: torch.nn.Module, report: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, weight in report["adapters"].items() if isinstance(model, PeftModel) else ():
        config: Any = model.peft_config[name]
        targets = config.target_modules
        named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
        rows.append(f"| adapter | {kind}, r = {config.r}, alpha = {config.lora_alpha}, on {named} |")
        if weight != 1:
            rows.append(f"| weight of the adapter | {weight} |")
    if report["adapter_scale"] != 1:
        rows.append(f"| scale of the adapter | {report['adapter_scale']} |")
    if report["base_weight"]:
        rows.append(f"| share of the base in the average | {report['base_weight']} |")
    return rows


def public_name(base: str) -> tuple[str, bool]:
    """The base's name without the folder it lies in, and whether it is a hub id."""
    local = Path(base).expanduser().exists() or base.startswith((".", "/", "~")) or ":" in base
    if local:
        return Path(base).name.rpartition(":")[2] or "language model", False
    return base, base.count("/") == 1
