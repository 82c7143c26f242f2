"""`unsloth checkpoints`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from unsloth.core.errors import CheckpointError, ConfigError
from unsloth.train import discovery, lock
from unsloth.train.discovery import TRAINER_STATE, Checkpoint

_Judged: TypeAlias = list[tuple[Checkpoint, str | None]]  # each with its problem, if it has one


@dataclass(frozen=True)
class CheckpointsOptions:
    """What to do with a run's folder.

    Attributes:
        folder: The ``output_dir`` of the run.
        verify: Read every file and compare it with the manifest.
        prune: Delete all but this many of the newest whole checkpoints, and the best one; None deletes nothing.
    """

    folder: str
    verify: bool = False
    prune: int | None = None

    def __post_init__(self) -> None:
        if not Path(self.folder).is_dir():
            raise ConfigError("there is no such folder", got=self.folder, do="Give the output_dir of a run.")
        if self.prune is not None and self.prune < 1:
            raise ConfigError("--prune must leave at least 1 checkpoint", got=self.prune)


def run(options: CheckpointsOptions, console: Console | None = None) -> None:
    """Show the checkpoints; verify and prune them if asked to.

    Raises:
        CheckpointError: ``verify`` found damage; raised after everything was shown.
        StorageError: A run is writing to the folder, so nothing can be pruned.
    """
    console = console or Console()
    folder = Path(options.folder)
    found = [(checkpoint, _problem(checkpoint, options)) for checkpoint in discovery.listing(folder)]
    if not found:
        console.print(f"no checkpoints in {folder}", highlight=False)
        return
    best = _best(found)
    console.print(_table(found, best, options.verify))
    if options.prune is not None:
        with lock.held(folder):
            for path in _prune(found, options.prune, best):
                console.print(f"deleted {path}", highlight=False)
    damaged = [checkpoint.path.name for checkpoint, problem in found if problem]
    if options.verify and damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(found)} checkpoints cannot be resumed from: {', '.join(damaged)}",
            do="Resuming takes the newest whole one; --prune 1 deletes the others.",
        )


def _problem(checkpoint: Checkpoint, options: CheckpointsOptions) -> str | None:
    if checkpoint.problem or not (options.verify or options.prune is not None):
        return checkpoint.problem
    return next(iter(discovery.problems(checkpoint.path)), None)


def _table(found: _Judged, best: str | None, verified: bool) -> Table:
    table = Table("checkpoint", "step", "epoch", "size", "state", box=None, pad_edge=False)
    for checkpoint, problem in found:
        epoch = (checkpoint.details or {}).get("epoch")
        fine = "whole" if verified else "complete" if checkpoint.details else ""
        mark = " (best)" if checkpoint.path.name == best else ""
        table.add_row(
            checkpoint.path.name,
            str(checkpoint.step),
            "" if epoch is None else f"{epoch:.2f}",
            f"{_size(checkpoint.path) / 2**20:,.1f} MiB",
            (problem or fine) + mark,
        )
    return table


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _best(found: _Judged) -> str | None:
    """Name of the best checkpoint so far, as the newest sound one knows it."""
    for checkpoint, problem in reversed(found):
        if problem is None:
            best = json.loads((checkpoint.path / TRAINER_STATE).read_text()).get("best_model_checkpoint")
            return Path(best).name if best else None
    return None


def _prune(found: _Judged, count: int, best: str | None) -> list[Path]:
    whole = [checkpoint.path for checkpoint, problem in found if problem is None]
    if not whole:
        raise CheckpointError("no checkpoint there is whole, so none was deleted", do="Look at them with --verify.")
    kept = {*whole[-count:], *(path for path in whole if path.name == best)}
    return discovery.delete(checkpoint.path for checkpoint, _ in found if checkpoint.path not in kept)
