"""Tool calls in what a model wrote.

Three ways of writing them are read: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Qwen, Hermes,
SmolLM), ``[TOOL_CALLS][{...}, ...]`` (Mistral), and a whole answer that is one such object, with ``parameters`` for
``arguments`` allowed (Llama 3.1) or a list of them. What is none of these stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE, _LIST = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call.

    Attributes:
        id: Made up here; answers of tools refer to it.
        name: Of the function.
        arguments: As JSON text.
    """

    id: str
    name: str
    arguments: str

    def body(self, index: int | None = None) -> dict[str, Any]:
        """As in the OpenAI interface; streamed ones have an index."""
        call: dict[str, Any] = {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return call if index is None else {"index": index, **call}


def split(text: str) -> tuple[str, list[ToolCall]]:
    """The text of an answer without its calls, and the calls; a call that cannot be read stays in the text."""
    stripped = text.strip().removeprefix(_PYTHON_TAG).strip()
    if stripped.startswith(_LIST):
        found = _calls(stripped.removeprefix(_LIST))
        return ("", found) if found else (text, [])
    if stripped.startswith(("{", "[{")):
        found = _calls(stripped)
        return ("", found) if found else (text, [])
    kept, calls = "", []
    for piece, is_call in _tagged(text):
        found = _calls(piece) if is_call else []
        calls += found
        if not found:
            kept += f"{_OPEN}{piece}{_CLOSE}" if is_call else piece
    return (kept.strip(), calls) if calls else (text, [])


def looks_like_one(text: str) -> bool:
    """Whether an answer holds the beginning of a call, which may be one that cannot be read."""
    return _OPEN in text or text.lstrip().startswith((_LIST, _PYTHON_TAG))


def settled(text: str) -> int:
    """How many characters at the start of an unfinished answer are text for certain, not part of a call."""
    start = len(text) - len(text.lstrip())
    head = text[start:]
    if any(head.startswith(mark[: len(head)]) or head.startswith(mark) for mark in ("{", "[{", _LIST, _PYTHON_TAG)):
        return 0
    found = text.find(_OPEN)
    if found >= 0:
        return found
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-length:]):
            return len(text) - length
    return len(text)


def _tagged(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces outside and inside the tags; an open tag at the end holds the rest."""
    before, *rest = text.split(_OPEN)
    yield before, False
    for piece in rest:
        inside, _, after = piece.partition(_CLOSE)
        yield inside, True
        yield after, False


def _calls(text: str) -> list[ToolCall]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return []
    items = value if isinstance(value, list) else [value]
    read = [_call(item) for item in items]
    return [call for call in read if call is not None] if all(read) else []


def _call(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        text = arguments
    elif isinstance(arguments, dict):
        text = json.dumps(arguments, ensure_ascii=False)
    else:
        return None
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", item["name"], text)
