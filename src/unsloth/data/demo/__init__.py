"""A small data set of real text that ships with the library: café orders and their kitchen tickets."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def train_rows() -> list[dict[str, Any]]:
    """The 360 training conversations, each a mapping with ``messages``."""
    return _read("train.jsonl")


def heldout_rows() -> list[dict[str, Any]]:
    """The 48 held-out conversations; none repeats a training row."""
    return _read("heldout.jsonl")


def _read(name: str) -> list[dict[str, Any]]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
