"""The checkpoints in an output folder: which there are, which are whole, which go when there are too many."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.core import artifact
from unsloth.core.errors import CheckpointError, StorageError
from unsloth.core.log import get_logger

PREFIX = "checkpoint-"
KIND = "checkpoint"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX}(\d+)")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is called like a checkpoint.

    Attributes:
        path: The folder.
        step: The step in its name.
        serial: Counts the checkpoints made in this output folder, whatever their step; 0 if unknown. The newest is
            the one with the highest serial, not the one with the highest step: an earlier, longer run may have left
            its own behind.
        details: What its manifest says; None if it has none that can be read.
        problem: Why it cannot be resumed from, as far as the manifest alone tells; None if nothing speaks against it.
        is_empty: It holds no file at all.
    """

    path: Path
    step: int
    serial: int = 0
    details: dict[str, Any] | None = None
    problem: str | None = None
    is_empty: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Sorts from oldest to newest."""
        return self.serial, self.step


@dataclass(frozen=True)
class Found:
    """The outcome of a search: the newest whole checkpoint, if any, and what was passed over and why."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...]
    damaged: bool  # whether something that was passed over had files in it


def listing(output_dir: Path) -> list[Checkpoint]:
    """All real folders named ``checkpoint-NUMBER``, oldest first; their files are not read."""
    found = []
    for path in _entries(output_dir):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append(_inspect(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def newest_whole(output_dir: Path, tolerated: Collection[str] = ()) -> Found:
    """Find the newest checkpoint all of whose files are as its manifest says.

    Args:
        output_dir: The folder of a run; need not exist.
        tolerated: Files whose damage does not matter.
    """
    skipped = [f"{path.name} {reason}" for path in _entries(output_dir) if (reason := _misnamed(path))]
    checkpoints = listing(output_dir)
    skipped += [f"{checkpoint.path.name} ({checkpoint.problem})" for checkpoint in checkpoints if checkpoint.problem]
    damaged = any(checkpoint.problem and not checkpoint.is_empty for checkpoint in checkpoints)
    for checkpoint in reversed([checkpoint for checkpoint in checkpoints if not checkpoint.problem]):
        problem = next(iter(problems(checkpoint.path, tolerated)), None)
        if problem is None:
            return Found(checkpoint, tuple(skipped), damaged)
        skipped.append(f"{checkpoint.path.name} ({problem})")
        damaged = True
    return Found(None, tuple(skipped), damaged)


def problems(folder: Path, tolerated: Collection[str] = ()) -> list[str]:
    """One sentence for each file of a checkpoint that is not as its manifest says, except those tolerated."""
    try:
        found = artifact.verify(folder)
    except StorageError:
        return [f"{artifact.MANIFEST} is damaged"]
    return [problem for problem in found if problem.split(" ", 1)[0] not in tolerated]


def require_whole(folder: Path, tolerated: Collection[str] = ()) -> dict[str, Any] | None:
    """Check a folder that the user named; return its manifest's details, or None if it has no manifest.

    Raises:
        CheckpointError: There is no such folder, it is empty, or one of its files is damaged; names the file.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such checkpoint folder", got=folder, do=_advice(folder.parent))
    if not any(folder.iterdir()):
        raise CheckpointError("the checkpoint folder is empty", got=folder, do=_advice(folder.parent))
    if not (folder / artifact.MANIFEST).is_file():
        return None
    found = problems(folder, tolerated)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(f"the checkpoint {folder} is damaged: {found[0]}{more}", do=_advice(folder.parent))
    manifest = artifact.read_manifest(folder)
    return manifest["details"] if manifest else None


def next_serial(output_dir: Path) -> int:
    """The serial number of the next checkpoint in this folder."""
    return 1 + max((checkpoint.serial for checkpoint in listing(output_dir)), default=0)


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path | str | None]) -> list[Path]:
    """Delete the oldest checkpoints beyond ``limit``, and return them.

    Args:
        output_dir: The folder of the run.
        limit: How many to have; None or 0 keeps all.
        keep: Never deleted: the newest one, and the best one.
    """
    if not limit or limit < 0:
        return []
    checkpoints = listing(output_dir)
    kept = {os.path.realpath(path) for path in keep if path is not None}
    kept &= {os.path.realpath(checkpoint.path) for checkpoint in checkpoints}
    excess = len(checkpoints) - max(limit, len(kept))
    old = [checkpoint.path for checkpoint in checkpoints if os.path.realpath(checkpoint.path) not in kept]
    return delete(old[: max(excess, 0)])


def delete(folders: Iterable[Path]) -> list[Path]:
    """Delete checkpoints, each renamed first so that no half one is ever found under its name; return them."""
    removed = list(folders)
    for path in removed:
        artifact.retire(path)
    return removed


def _entries(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob(f"{PREFIX}*")) if output_dir.is_dir() else []


def _misnamed(path: Path) -> str | None:
    if path.is_symlink():
        return "(a symbolic link)"
    if not path.is_dir():
        return "(a file)"
    return None if _NAME.fullmatch(path.name) else "(no step number)"


def _inspect(path: Path, step: int) -> Checkpoint:
    if not any(path.iterdir()):
        return Checkpoint(path, step, problem="empty", is_empty=True)
    try:
        manifest = artifact.read_manifest(path)
    except StorageError:
        return Checkpoint(path, step, problem=f"{artifact.MANIFEST} is damaged")
    if manifest is None:
        return Checkpoint(path, step, problem="no manifest: not made by this library, or not whole")
    details = manifest["details"]
    if manifest["kind"] != KIND or not isinstance(details.get("step"), int):
        return Checkpoint(path, step, problem="its manifest is not one of a checkpoint")
    problem = None if details["step"] == step else f"its manifest says step {details['step']}"
    return Checkpoint(path, step, int(details.get("serial", 0)), details, problem)


def _advice(output_dir: Path) -> str:
    found = newest_whole(output_dir).checkpoint
    return f"The newest whole one there is {found.path.name}." if found else "There is no whole one beside it."
