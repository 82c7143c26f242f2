"""The course of a run as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unsloth.core.errors import TrainingError


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw training and evaluation loss over steps into a PNG file.

    Args:
        log_history: ``trainer.state.log_history``.
        path: The file to write.

    Raises:
        TrainingError: Nothing was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not train and not evaluation:
        raise TrainingError("there is no loss to draw: the run logged nothing", do="Lower logging_steps.")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), label="training", color="#2563eb", linewidth=1.5)
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), label="held out", color="#ea580c", marker="o", linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
