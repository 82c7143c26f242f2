"""A record of failures of the sandbox itself, which no handler around a reward function can lose.

Reward functions often score every exception ("crashed: -3"). A sandbox that could not start is no fault of the
completion, so it is also written down here, and :mod:`unsloth.rewards.call` masks what was scored meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """Why the machinery failed, and for which row of the batch (None: unknown)."""

    reason: str
    row: int | None


_RECORD: ContextVar[list[Failure] | None] = ContextVar("infra failures", default=None)


@contextlib.contextmanager
def watch() -> Iterator[list[Failure]]:
    """Yield a list that receives every failure recorded during the block.

    Threads started in the block are not covered unless they run in a copy of its context.
    """
    reasons: list[Failure] = []
    token = _RECORD.set(reasons)
    try:
        yield reasons
    finally:
        _RECORD.reset(token)


def record(reason: str, row: int | None = None) -> None:
    """Note a failure, and which completion of the batch it concerns, if that is known."""
    reasons = _RECORD.get()
    if reasons is not None:
        reasons.append(Failure(reason, row))
