"""What is shown of a run with rewards: which figures, in which words, as a line, a table, a file and a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.core.errors import TrainingError

Entry = Mapping[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Figure:
    """A figure of the log.

    Attributes:
        name: How it is called where it is shown.
        key: Its key in the log.
        form: Format of the number.
        inside: Whether it is a part of the figure above it.
    """

    name: str
    key: str
    form: str = ".3f"
    inside: bool = False

    def text(self, entry: Entry) -> str:
        """The number as shown; a dash where there is none."""
        value = entry.get(self.key)
        return "-" if value is None else format(value, self.form)


_FIGURES = (
    Figure("spread", "reward_std"),
    Figure("groups all alike", "frac_reward_zero_std", ".0%"),
    Figure("left out", "rewards/masked", ".0f"),
    Figure("length", "completions/mean_length", ".1f"),
    Figure("cut by length", "completions/clipped_ratio", ".0%"),
    Figure("turns", "environment/turns", ".2f"),
    Figure("turns cut", "environment/cut_ratio", ".0%"),
    Figure("tool calls", "tools/call_frequency", ".2f"),
    Figure("failed calls", "tools/failure_frequency", ".0%"),
    Figure("malformed calls", "tools/malformed_frequency", ".0%"),
    Figure("KL", "kl", ".4f"),
    Figure("entropy", "entropy"),
    Figure("clipped", "clip_ratio/region_mean", ".1%"),
    Figure("mismatch", "sampling/sampling_logp_difference/mean", ".1e"),
    Figure("sampling tokens/s", "rollout/tokens_per_second", ",.0f"),
    Figure("training tokens/s", "training/tokens_per_second", ",.0f"),
    Figure("sampling GiB", "rollout/memory_gib", ".2f"),
    Figure("training GiB", "training/memory_gib", ".2f"),
)
_OFTEN_NOTHING = ("rewards/masked", "completions/clipped_ratio", "environment/cut_ratio", "tools/malformed_frequency")


def entries(history: Sequence[Entry]) -> list[Entry]:
    """Those entries of a log that are about a training step with rewards."""
    return [entry for entry in history if "reward" in entry]


def figures(history: Sequence[Entry]) -> list[Figure]:
    """The figures that a log has, the reward with its functions first."""
    known = {key for entry in history for key, value in entry.items() if value is not None}
    functions = sorted(key for key in known if key.startswith("rewards/") and key.endswith("/mean"))
    found = [Figure("reward", "reward")]
    if len(functions) > 1:
        found += [Figure(key.split("/")[1], key, inside=True) for key in functions]
    return found + [
        figure
        for figure in _FIGURES
        if figure.key in known and (figure.key not in _OFTEN_NOTHING or any(entry.get(figure.key) for entry in history))
    ]


def line(entry: Entry) -> str:
    """The figures of one entry in a line."""
    reward, *others = figures([entry])
    functions = ", ".join(f"{figure.name} {figure.text(entry)}" for figure in others if figure.inside)
    shown = [f"reward {reward.text(entry)} ({functions})" if functions else f"reward {reward.text(entry)}"]
    return "  ".join(shown + [f"{figure.name} {figure.text(entry)}" for figure in others if not figure.inside])


def evaluation_line(entry: Entry) -> str:
    """The reward of an evaluation, and what each function gave, in a line."""
    return line({name.removeprefix("eval_"): entry[name] for name in entry if "reward" in name and "std" not in name})


def course(values: Sequence[float | None], width: int = 32) -> str:
    """A row of numbers as blocks of different height; neighbours are averaged where there are more than ``width``."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    count = min(width, len(known))
    edges = [place * len(known) // count for place in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def write_csv(history: Sequence[Entry], path: str | os.PathLike[str]) -> Path:
    """Write every figure that was logged with a reward, a row for each entry.

    Raises:
        TrainingError: Nothing was logged.
    """
    found = _some(history)
    names = ["step", *sorted({name for entry in found for name in entry} - {"step"})]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dict(entry) for entry in found)
    partial.replace(path)
    return path


_PANELS = (
    ("completion length (tokens)", ("completions/mean_length",)),
    ("entropy, KL (nats)", ("entropy", "kl")),
    ("share of tokens clipped, groups all alike", ("clip_ratio/region_mean", "frac_reward_zero_std")),
    ("mismatch of log-probabilities (nats)", ("sampling/sampling_logp_difference/mean",)),
    ("tokens/s", ("rollout/tokens_per_second", "training/tokens_per_second")),
    ("peak memory of the GPU (GiB)", ("rollout/memory_gib", "training/memory_gib")),
)
_NAMES = {
    "completions/mean_length": "mean",
    "clip_ratio/region_mean": "clipped",
    "frac_reward_zero_std": "groups all alike",
    "sampling/sampling_logp_difference/mean": "mean",
    "rollout/tokens_per_second": "sampling",
    "training/tokens_per_second": "training",
    "rollout/memory_gib": "sampling",
    "training/memory_gib": "training",
    "kl": "KL",
}
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")


def plot(history: Sequence[Entry], path: str | os.PathLike[str]) -> Path:
    """Draw the rewards, large, and the other figures over the steps into a PNG file.

    Raises:
        TrainingError: Nothing was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    found = _some(history)
    panels = [(title, keys) for title, keys in _PANELS if any(_points(found, key)[0] for key in keys)]
    columns = max(3, len(panels) - 2)  # two beside the rewards, the others below
    picture = Picture(figsize=(4 * columns, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    grid = picture.add_gridspec(3, columns)
    axes = picture.add_subplot(grid[:2, :-1])
    steps, rewards = _points(found, "reward")
    spread = dict(zip(*_points(found, "reward_std"), strict=True))
    band = [spread.get(step, 0.0) for step in steps]
    lower, upper = zip(*[(r - s, r + s) for r, s in zip(rewards, band, strict=True)], strict=True)
    axes.fill_between(steps, lower, upper, color=_COLOURS[0], alpha=0.12, linewidth=0, label="spread of rewards")
    axes.plot(steps, rewards, color=_COLOURS[0], alpha=0.35, linewidth=1)
    axes.plot(steps, _smooth(rewards), color=_COLOURS[0], linewidth=2.2, label="reward")
    functions = [figure for figure in figures(found) if figure.inside]
    for figure, colour in zip(functions, _COLOURS[1:], strict=False):
        places, values = _points(found, figure.key)
        axes.plot(places, _smooth(values), color=colour, linewidth=1.5, label=figure.name)
    _dress(axes, "reward (unweighted for each function; running means)")
    spots = [(0, columns - 1), (1, columns - 1), *((2, column) for column in range(columns))]
    for spot, (title, keys) in zip(spots, panels, strict=False):
        axes = picture.add_subplot(grid[spot])
        for key, colour in zip(keys, _COLOURS, strict=False):
            at, values = _points(found, key)
            if at:
                axes.plot(at, values, color=colour, linewidth=1.3, label=_NAMES.get(key, key))
        axes.set_ylim(bottom=0)
        _dress(axes, title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.savefig(partial, format="png")
    partial.replace(path)
    return path


def _some(history: Sequence[Entry]) -> list[Entry]:
    found = entries(history)
    if not found:
        raise TrainingError("there are no rewards to show: the run logged none", do="Lower logging_steps.")
    return found


def _points(found: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    known = [(entry["step"], entry[key]) for entry in found if entry.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of a tenth of the run, shorter at its ends."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=8)
