"""Conversations that ship with the library, on which quantizers measure what matters in a chat model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any


def rows() -> list[dict[str, Any]]:
    """The conversations, each a mapping with ``messages``."""
    text = resources.files(__package__).joinpath("chat.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def plain(row: Mapping[str, Any]) -> str:
    """A conversation as text, for tokenizers without a chat template."""
    return "\n\n".join(message["content"] for message in row["messages"])
