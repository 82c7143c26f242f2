"""Why a run ended early, in words that say what to change."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import TrainingArguments

from unsloth.core.errors import TrainingError

_DEAD_WORKER = re.compile(r"DataLoader worker.*(killed|exited|terminated)", re.DOTALL)


def is_dead_worker(error: BaseException) -> bool:
    """Whether an exception means that a data loading worker has died."""
    return bool(_DEAD_WORKER.search(str(error)))


def dead_worker(error: BaseException, args: TrainingArguments, newest: Path | None) -> TrainingError:
    """For a data loading worker that has died."""
    return TrainingError(
        f"a data loading worker died ({str(error).strip().splitlines()[0]})",
        do=f"Often memory ran out: lower dataloader_num_workers (now {args.dataloader_num_workers}), then resume. "
        f"{where_to_resume(newest)}",
    )


def skipped_too_many(step: int, count: int, args: TrainingArguments, newest: Path | None) -> TrainingError:
    """For ``count`` steps in a row, up to ``step``, whose gradients were not finite."""
    return TrainingError(
        f"the gradients of {count} steps in a row were not finite, up to step {step}; none of these steps was taken",
        do=f"Lower learning_rate (now {args.learning_rate:g}), compute in bfloat16 or float32, and check the rows of "
        f"those steps. {where_to_resume(newest)}",
    )


def out_of_memory(step: int, evaluating: bool, args: TrainingArguments, newest: Path | None) -> TrainingError:
    """For memory that ran out after ``step`` steps; names three arguments that take less, with their values."""
    what = "an evaluation" if evaluating else f"step {step + 1}"
    return TrainingError(
        f"out of memory in {what}; the weights are those after step {step}",
        do=f"Lower per_device_train_batch_size (now {args.per_device_train_batch_size}; raise "
        f"gradient_accumulation_steps, now {args.gradient_accumulation_steps}, by as much), lower max_length (now "
        f"{getattr(args, 'max_length', None)}), or use gradient checkpointing (now "
        f"{'on' if args.gradient_checkpointing else 'off'}). {where_to_resume(newest)}",
    )


def where_to_resume(newest: Path | None) -> str:
    """The sentence that names the last good checkpoint."""
    return "There is no checkpoint of this run yet." if newest is None else f"The last good checkpoint is {newest}."
