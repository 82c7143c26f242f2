"""Checks of the output folder before a run starts: that it can be written to, and that there is room."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

from transformers.trainer_utils import SaveStrategy
from transformers.training_args import TrainingArguments

from unsloth.core.artifact import readable_os_errors
from unsloth.core.errors import StorageError
from unsloth.core.log import get_logger

_PROBE_BYTES = 4096

logger = get_logger(__name__)


def check_path(folder: Path) -> None:
    """Raise :class:`StorageError` if ``folder`` cannot become a writable folder; writes nothing."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise StorageError("the output folder would be inside a file, or is one", got=existing, do="Choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError("the output folder cannot be written to", got=existing, do="Choose another.")


def check_writable(folder: Path) -> None:
    """Create ``folder`` and write a small file into it, which finds quotas and full disks; the file is removed.

    Raises:
        StorageError: It could not be written.
    """
    check_path(folder)
    with readable_os_errors(folder, _PROBE_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".unsloth-probe-") as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())


def check_room(folder: Path, checkpoint_bytes: int, count: int) -> None:
    """Compare the free space with what the run will write.

    Args:
        folder: The output folder; need not exist.
        checkpoint_bytes: Size of one checkpoint, estimated.
        count: How many will be there at the same time at most.

    Raises:
        StorageError: There is not even room for one. If there is room for one but not for all, this is logged.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < checkpoint_bytes:
        raise StorageError(
            f"no room for a checkpoint in {folder}: about {checkpoint_bytes:,} bytes needed, {free:,} free",
            do='Free some space, choose another output_dir, or train without checkpoints: save_strategy="no".',
        )
    if free < checkpoint_bytes * count:
        logger.warning(
            "%s has %s bytes free, but the %d checkpoints of this run will take about %s: set save_total_limit",
            folder,
            f"{free:,}",
            count,
            f"{checkpoint_bytes * count:,}",
        )


def checkpoints_at_once(args: TrainingArguments, rows: int | None) -> int:
    """How many checkpoints a run will have at the same time at most, as far as its arguments tell.

    Args:
        args: Arguments of the run.
        rows: Of the training data; None if unknown.
    """
    if args.save_total_limit:
        return args.save_total_limit + 1  # the new one is there before the oldest goes
    if args.save_strategy == SaveStrategy.EPOCH:
        return math.ceil(args.num_train_epochs)
    steps: float = args.max_steps
    if steps <= 0 and rows is not None:
        steps = args.num_train_epochs * math.ceil(rows / (args.train_batch_size * args.gradient_accumulation_steps))
    if args.save_strategy != SaveStrategy.STEPS or steps <= 0:
        return 1
    return math.ceil(1 / args.save_steps) if args.save_steps < 1 else math.ceil(steps / args.save_steps)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest of its parents that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))
