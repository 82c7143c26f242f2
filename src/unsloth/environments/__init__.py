"""Environments for reinforcement learning: games of several turns, a calculator, and boards that programs play on.

They are plain classes; ``docs/environments.md`` says what one needs. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    name: f"unsloth.environments.{module}"
    for module, names in {
        "board_2048": ("Board", "Game2048", "GameBoard"),
        "calculator": ("calculate",),
        "guess_the_number": ("GuessTheNumber",),
    }.items()
    for name in names
}

__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unsloth.environments' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
