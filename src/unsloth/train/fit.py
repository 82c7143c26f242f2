"""What fits into a given memory, and what to change if a run does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from unsloth.models import adapters, load
from unsloth.train.estimate import MemoryEstimate, Training, estimate, longest_sequence
from unsloth.train.grpo_config import GRPOConfig

_TRIES = 6
_LARGEST_BATCH = 65536
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Plan:
    """A run, as far as its memory goes; see :func:`unsloth.train.estimate.estimate` for the attributes."""

    load: load.LoadOptions
    adapter: adapters.AdapterOptions | None
    training: Training
    config: PretrainedConfig

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return longest_sequence(self.training, self.load)

    def memory(self) -> MemoryEstimate:
        """The memory of this run."""
        return estimate(self.load, self.adapter, self.training, config=self.config, sequence_length=self.length)

    def with_training(self, **values: Any) -> Plan:
        """The same run with other hyperparameters."""
        training = copy.copy(self.training)
        for name, value in values.items():
            setattr(training, name, value)
        return replace(self, training=training)

    def with_length(self, tokens: int) -> Plan:
        """The same run with rows of so many tokens, or completions that end there."""
        if not isinstance(self.training, GRPOConfig):
            return self.with_training(max_length=tokens)
        prompt = self.length - self.training.max_completion_length
        room = replace(self, load=replace(self.load, max_seq_length=max(tokens, self.load.max_seq_length)))
        return room.with_training(max_prompt_length=prompt, max_completion_length=max(1, tokens - prompt))

    def with_checkpointing(self) -> Plan:
        """The same run, with activations computed again in the backward pass instead of kept."""
        adapter = self.adapter and replace(self.adapter, use_gradient_checkpointing="unsloth")
        changed = replace(self, load=replace(self.load, use_gradient_checkpointing="unsloth"), adapter=adapter)
        return changed.with_training(_checkpointing_follows_model=True)


@dataclass(frozen=True)
class Knob:
    """A change to a run that saves memory: the line to write into its file, and the memory that it then takes."""

    setting: str
    memory: MemoryEstimate


def largest_batch(plan: Plan, limit: int, now: MemoryEstimate) -> int:
    """The largest ``per_device_train_batch_size`` that fits into ``limit`` bytes; 0 if none does.

    Args:
        plan: The run.
        limit: Bytes.
        now: The run's own memory.
    """

    def total(size: int) -> int:
        return plan.with_training(per_device_train_batch_size=size).memory().total

    return _largest(total, limit, (now.batch_size, now.total), _LARGEST_BATCH)


def largest_length(plan: Plan, limit: int, now: MemoryEstimate) -> int:
    """The largest row length in tokens that fits into ``limit`` bytes; 0 if none does.

    A multiple of 64, or the run's own length, and at most what the model was trained for.

    Args:
        plan: The run.
        limit: Bytes.
        now: The run's own memory.
    """
    own = getattr(plan.config.get_text_config(), "max_position_embeddings", None) or 2**20

    def total(steps: int) -> int:
        return plan.with_length(steps * _LENGTH_STEP).memory().total

    start = -(-plan.length // _LENGTH_STEP)
    steps = _largest(total, limit, (start, now.total), max(start, own // _LENGTH_STEP))
    return min(plan.length, steps * _LENGTH_STEP) if steps == start else steps * _LENGTH_STEP


def knobs(plan: Plan, now: MemoryEstimate) -> list[Knob]:
    """Changes that take less memory than ``now``, one at a time, the most saving first."""
    tried = [Knob(setting, changed.memory()) for setting, changed in _changes(plan)]
    return sorted((knob for knob in tried if knob.memory.total < now.total), key=lambda knob: knob.memory.total)


def _changes(plan: Plan) -> list[tuple[str, Plan]]:
    training, changes = plan.training, []
    batch = training.per_device_train_batch_size
    if batch > 1:
        accumulation = training.gradient_accumulation_steps * batch
        setting = f"training.per_device_train_batch_size: 1 with training.gradient_accumulation_steps: {accumulation}"
        if isinstance(training, GRPOConfig):  # groups may be spread over batches if that is said
            setting += f" and training.steps_per_generation: {accumulation}"
        smaller = plan.with_training(per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)
        changes.append((setting, smaller))
    policy = (plan.adapter or plan.load).use_gradient_checkpointing
    if not (policy if training._checkpointing_follows_model else training.gradient_checkpointing):
        section = "model" if plan.adapter is None else "adapter"
        changes.append((f"{section}.use_gradient_checkpointing: unsloth", plan.with_checkpointing()))
    if plan.length > 2 * _LENGTH_STEP:
        changes.append(_shorter(plan))
    if "8bit" not in str(getattr(training.optim, "value", training.optim)):
        changes.append(("training.optim: adamw_8bit", plan.with_training(optim="adamw_8bit")))
    if not plan.load.offload_embedding:
        changes.append(
            ("model.offload_embedding: true", replace(plan, load=replace(plan.load, offload_embedding=True)))
        )
    if plan.load.precision in ("16bit", "8bit"):
        changes.append(("model.load_in_4bit: true", replace(plan, load=replace(plan.load, precision="4bit"))))
    if plan.load.precision == "full":
        adapter = adapters.AdapterOptions(use_gradient_checkpointing=plan.load.use_gradient_checkpointing)
        quantized = replace(plan, load=replace(plan.load, precision="4bit"), adapter=adapter)
        changes.append(("model.load_in_4bit: true instead of full_finetuning (trains an adapter)", quantized))
    return changes


def _shorter(plan: Plan) -> tuple[str, Plan]:
    if not isinstance(plan.training, GRPOConfig):
        return f"training.max_length: {plan.length // 2}", plan.with_length(plan.length // 2)
    completion = max(1, plan.training.max_completion_length // 2)
    shorter = plan.with_length(plan.length - plan.training.max_completion_length + completion)
    return f"training.max_completion_length: {completion}", shorter


def _largest(total: Callable[[int], int], limit: int, known: tuple[int, int], highest: int) -> int:
    """The largest number whose ``total``, which grows about linearly with it, is at most ``limit``; 0 if none is.

    Args:
        total: Bytes for a number; takes seconds.
        limit: Bytes.
        known: A number and its total.
        highest: No larger number is wanted.
    """
    measured = dict([known])
    for _ in range(_TRIES):
        fits = max((n for n, size in measured.items() if size <= limit), default=0)
        too_many = min((n for n, size in measured.items() if size > limit), default=highest + 1)
        candidate = min(max(_crossing(measured, limit, fits), fits), too_many - 1)
        if candidate == fits:
            return fits
        measured[candidate] = total(candidate)
    return max((n for n, size in measured.items() if size <= limit), default=0)


def _crossing(measured: dict[int, int], limit: int, fits: int) -> int:
    """Where the straight line through the two measurements nearest to the limit meets it."""
    if len(measured) < 2:
        return 2 * fits if fits else max(1, next(iter(measured)) // 2)
    low, high = sorted(sorted(measured, key=lambda n: abs(measured[n] - limit))[:2])
    slope = max(1.0, (measured[high] - measured[low]) / (high - low))
    return int(low + (limit - measured[low]) / slope)
