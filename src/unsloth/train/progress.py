"""What a run shows while it trains, and the summary at its end."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """A progress bar with loss, learning rate, tokens per second and time left; plain lines where there is no terminal.

    Args:
        console: Where to show it; None makes one on standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._first_step = 0
        self._tokens = 0
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._skipped = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all batches so far over the time since the start."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._tokens = 0
        self._first_loss = self._last_loss = None
        self._skipped = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self._console.is_terminal or self._console.is_jupyter:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, figures="")
            self._bar.start()
            self._bar.update(self._task, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, with the time left."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step, figures=self._figures(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take up the newest loss and token count; print a line if there is no bar."""
        logs = logs or {}
        self._tokens = int(logs.get("num_tokens", self._tokens))
        self._skipped = int(logs.get("skipped_steps", self._skipped))
        if "loss" in logs:
            self._last_loss = logs["loss"]
            self._first_loss = self._last_loss if self._first_loss is None else self._first_loss
        if "eval_loss" in logs:
            self._say(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=self._figures(state, logs))
        elif "loss" in logs:
            self._say(f"step {state.global_step}/{state.max_steps}  {self._figures(state, logs)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar and print the summary."""
        self.close()
        steps = state.global_step - self._first_step
        parts = [f"{steps} steps in {self._elapsed()}"]
        if self._first_loss is not None and self._last_loss is not None:
            parts.append(f"loss {self._first_loss:.4f} to {self._last_loss:.4f}")
        if self._tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if torch.cuda.is_available():
            parts.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        if self._skipped:
            parts.append(f"{self._skipped} of the steps not taken, their gradients were not finite")
        self._say(f"trained {', '.join(parts)}")

    def close(self) -> None:
        """Remove the bar, also when the run ends by an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, state: TrainerState, logs: dict[str, float] | None = None) -> str:
        latest = logs or next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        figures = []
        if "loss" in latest:
            figures.append(f"loss {latest['loss']:.4f}")
        if "learning_rate" in latest:
            figures.append(f"lr {latest['learning_rate']:.2e}")
        if self._tokens:
            figures.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self._skipped:
            figures.append(f"{self._skipped} skipped")
        left = self._left(state)
        return "  ".join([*figures, left] if left else figures)

    def _elapsed(self) -> str:
        return _clock(time.monotonic() - self._started)

    def _left(self, state: TrainerState) -> str:
        """How long the rest of the run takes; nothing before the first step."""
        done = state.global_step - self._first_step
        if not done:
            return ""
        return f"{_clock((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))} left"

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")
