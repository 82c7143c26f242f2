"""What a run with rewards shows while it trains, and the files that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from unsloth.rewards.completions import text_of
from unsloth.train import rollout_metrics
from unsloth.train.progress import TrainingProgress

CSV, PICTURE = "rewards.csv", "rewards.png"
_LONGEST = 600


@dataclass(frozen=True)
class Sample:
    """A completion and what it got.

    Attributes:
        prompt: Its prompt, or the last message of it.
        completion: The text; of several turns all of them, each after its role.
        rewards: By function, NaN where one did not apply.
        advantage: How much better than its group.
    """

    prompt: str
    completion: str
    rewards: Mapping[str, float]
    advantage: float


def samples(logs: Mapping[str, Any]) -> list[Sample]:
    """The best and the worst completion of the newest batch.

    Args:
        logs: What TRL's trainer keeps of a batch: ``prompt``, ``completion``, ``rewards`` by function, ``advantages``.
    """
    advantages = list(logs["advantages"])
    if not advantages:
        return []
    places = range(len(advantages))
    best = max(places, key=advantages.__getitem__)
    worst = min(places, key=advantages.__getitem__)
    return [_sample(logs, place) for place in dict.fromkeys((best, worst))]


def _sample(logs: Mapping[str, Any], place: int) -> Sample:
    rewards = {name: list(values)[place] for name, values in logs["rewards"].items()}
    completion = list(logs["completion"])[place]
    return Sample(text_of(list(logs["prompt"])[place]), _conversation(completion), rewards, logs["advantages"][place])


def _conversation(completion: Any) -> str:
    if isinstance(completion, str) or len(completion) == 1:
        return text_of(completion) + _calls(completion)
    return "\n".join(f"{message['role']}: {text_of([message])}{_calls([message])}" for message in completion)


def _calls(completion: Any) -> str:
    calls = [] if isinstance(completion, str) else completion[-1].get("tool_calls") or []
    functions = [call["function"] for call in calls]
    return "".join(f" [{function['name']} {function['arguments']}]" for function in functions)


class RolloutProgress(TrainingProgress):
    """A live table of rewards and what goes with them, and sample completions; plain lines where there is no terminal.

    At the end the log is written into the output folder, as ``rewards.csv`` and as a picture, ``rewards.png``.

    Args:
        newest: Returns samples of the newest batch.
        show_samples: Whether samples are shown at all.
        console: Where to show it; None makes one on standard error.
    """

    def __init__(
        self, newest: Callable[[], Sequence[Sample]], show_samples: bool = True, console: Console | None = None
    ) -> None:
        super().__init__(console)
        self._newest = newest
        self._show_samples = show_samples
        self._live: Live | None = None
        self._samples_shown = -1
        self._peak = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the table."""
        super().on_train_begin(args, state, control, **kwargs)
        self._samples_shown, self._peak = -1, 0.0
        if self._bar is not None:
            self._bar.stop()  # it becomes a part of the whole
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
            )
            self._task = self._bar.add_task("training", total=state.max_steps, figures="", completed=state.global_step)
            self._live = Live(self._bar, console=self._console, refresh_per_second=4)
            self._live.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what is new."""
        logs = logs or {}
        if "eval_reward" in logs:
            self._say(f"step {state.global_step}: evaluation {rollout_metrics.evaluation_line(logs)}")
            return
        if "reward" not in logs:  # another update on completions whose rewards are known
            super().on_log(args, state, control, logs, **kwargs)
            return
        self._tokens = int(logs.get("num_tokens", self._tokens))
        self._skipped = int(logs.get("skipped_steps", self._skipped))
        peaks = [logs.get(name) or 0.0 for name in ("rollout/memory_gib", "training/memory_gib")]
        self._peak = max([self._peak, *peaks])
        if self._live is not None:
            self._live.update(self._table(state))
            return
        self._say(f"step {state.global_step}/{state.max_steps}  {rollout_metrics.line(logs)}  {self._left(state)}")
        tenth = state.global_step * 10 // max(state.max_steps, 1)
        if self._show_samples and tenth != self._samples_shown:
            self._samples_shown = tenth
            for sample in self._newest():
                self._say(_one_line(sample))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the table, say how it went, and write the files."""
        self.close()
        found = rollout_metrics.entries(state.log_history)
        if not found or not state.is_world_process_zero:
            return
        reward = [entry["reward"] for entry in found if entry["reward"] is not None]
        tenth = max(1, len(reward) // 10)
        parts = [f"{state.global_step - self._first_step} steps in {self._elapsed()}"]
        if reward:
            first, last = sum(reward[:tenth]) / tenth, sum(reward[-tenth:]) / tenth
            parts.append(f"reward {first:.3f} to {last:.3f} (means of the first and last tenth)")
        if self._peak:
            parts.append(f"peak GPU memory {self._peak:.2f} GiB")
        if self._skipped:
            parts.append(f"{self._skipped} of the steps not taken, their gradients were not finite")
        self._say(f"trained {', '.join(parts)}")
        folder = Path(args.output_dir)
        rollout_metrics.write_csv(found, folder / CSV)
        rollout_metrics.plot(found, folder / PICTURE)
        self._say(f"figures of every step: {folder / CSV}, {folder / PICTURE}")

    def close(self) -> None:
        """Remove the table, also when the run ends by an exception."""
        if self._live is not None:
            self._live.stop()
            self._live, self._bar = None, None
        super().close()

    def _table(self, state: TrainerState) -> Group:
        found = rollout_metrics.entries(state.log_history)
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        table.add_column("")
        table.add_column("first", justify="right")
        table.add_column("now", justify="right")
        table.add_column("course", no_wrap=True)
        for figure in rollout_metrics.figures(found):
            name = f"  {figure.name}" if figure.inside else figure.name
            style = "bold" if figure.key == "reward" else "dim" if figure.inside else ""
            values = [entry.get(figure.key) for entry in found]
            row = (name, figure.text(found[0]), figure.text(found[-1]), rollout_metrics.course(values))
            table.add_row(*row, style=style)
        parts: list[Any] = [self._bar, table] if self._bar is not None else [table]
        if self._show_samples:
            parts += [_panel(sample) for sample in self._newest()]
        return Group(*parts)

    def _figures(self, state: TrainerState, logs: dict[str, float] | None = None) -> str:
        known = rollout_metrics.figures([logs or {}])[1:] if self._bar is None else []
        return "  ".join([*(f"{figure.name} {figure.text(logs or {})}" for figure in known), self._left(state)])


def _scores(sample: Sample) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in sample.rewards.items())


def _panel(sample: Sample) -> Panel:
    title = f"{_scores(sample)}  advantage {sample.advantage:+.2f}"
    text = Text(_short(sample.prompt, _LONGEST // 3).strip(), style="dim")
    text.append("\n" + _short(sample.completion, _LONGEST), style="default")
    return Panel(text, title=Text(title), title_align="left", border_style="dim")


def _one_line(sample: Sample) -> str:
    prompt, completion = _short(sample.prompt, 80), _short(sample.completion, 200)
    return f"  {prompt!r} -> {completion!r}  ({_scores(sample)}, advantage {sample.advantage:+.2f})"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
