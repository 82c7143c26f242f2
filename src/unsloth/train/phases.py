"""Time and memory of the phases of a step in reinforcement learning: sampling, rewards, training."""

from __future__ import annotations

import time
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

GIB = 2**30


class Phases(TRLTrainer):
    """Measures them, before TRL's class.

    Adds to the metrics ``rewards/seconds``, ``training/tokens_per_second`` (prompts and completions, over the time that
    was neither sampling nor rewards) and, on a GPU, the peaks ``rollout/memory_gib``, with the engine's cache, and
    ``training/memory_gib``.
    """

    _tokens_logged: int | None = None
    rollouts: Any

    def _generate(self, prompts: list[Any]) -> Any:
        mode = "train" if self.model.training else "eval"
        if self._tokens_logged is None:
            self._tokens_logged = self.state.num_input_tokens_seen
        self._note_peak("training/memory_gib")
        found = super()._generate(prompts)
        self._note_peak("rollout/memory_gib", mode, 0 if self.rollouts is None else self.rollouts.cache_bytes)
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        found = super()._calculate_rewards(*args, **kwargs)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/seconds"].append(time.perf_counter() - start)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL."""
        found = self._metrics["train"]
        if self.model.training and found.get("step_time"):
            sampling = found.get("rollout/seconds", []) + found.get("rewards/seconds", [])
            seconds = sum(found["step_time"]) - sum(sampling)
            tokens = self.state.num_input_tokens_seen - (self._tokens_logged or 0)
            self._tokens_logged = self.state.num_input_tokens_seen
            if seconds > 0:
                found["training/tokens_per_second"].append(tokens * self.num_iterations / seconds)
            self._note_peak("training/memory_gib")
        super().log(logs, start_time)

    def _note_peak(self, name: str, mode: str = "train", beside: int = 0) -> None:
        """Take down the peak since the last call, with bytes ``beside`` what torch counts, and start a new one."""
        if self.accelerator.device.type != "cuda":
            return
        peak = (torch.cuda.max_memory_allocated(self.accelerator.device) + beside) / GIB
        before = self._metrics[mode][name]
        self._metrics[mode][name] = [max([peak, *before])]
        torch.cuda.reset_peak_memory_stats(self.accelerator.device)
