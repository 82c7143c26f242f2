"""The one type that all rows of conversations become, and how messages of other spellings are read into it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsloth.core.errors import DataError

ROLE_ALIASES = {
    "human": "user",
    "input": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "output": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What roles are called elsewhere, ShareGPT above all."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles that chat templates know."""

_ROLES = frozenset(ROLES)
_ESSENTIAL = {"role", "content"}


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each a mapping with at least ``role`` and ``content``.

    Attributes:
        messages: The messages; a message may carry more, such as ``tool_calls``, ``thinking`` or ``weight``.
        tools: The tools on offer, as JSON schemas, if any.
        variables: What else the row passes to the chat template, such as ``reasoning_effort``.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None


def parse_messages(messages: Any, number: int, column: str = "messages") -> list[dict[str, Any]]:
    """The messages of row ``number`` (counted from 0) with their keys and roles in one spelling.

    Args:
        messages: A list of mappings with ``role`` and ``content``, or with ``from`` and ``value``; a text that holds
            such a list as JSON is read.
        number: The row, for messages of errors.
        column: The column, likewise.

    Raises:
        DataError: Names the row, the message and what is wrong with it.
    """
    if isinstance(messages, str):
        messages = parse_json(messages, number, column)
    elif hasattr(messages, "tolist"):  # an array of numpy, as pandas reads lists from Parquet files
        messages = messages.tolist()
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(
            f"row {number}: '{column}' must be a non-empty list of messages",
            got=messages,
            do="Remove the row: dataset.filter(...).",
        )
    return [_message(message, number, position) for position, message in enumerate(messages)]


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, not a number, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and not value.strip()


def parse_json(text: str, number: int, column: str) -> Any:
    """The list that a text column holds as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise DataError(
            f"row {number}: '{column}' must be a list, but is text", got=text, do="Make it a list."
        ) from None


def pruned(value: Any) -> Any:
    """``value`` without keys whose value is None, at any depth: tables put them where rows differ in their keys."""
    if isinstance(value, Mapping):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def _message(message: Any, number: int, position: int) -> dict[str, Any]:
    if type(message) is dict and message.keys() == _ESSENTIAL:
        role, content = message["role"], message["content"]
        if type(role) is str and role in _ROLES and type(content) is str:
            return {"role": role, "content": content}
    where = f"row {number}, message {position}"
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where}: a message must be a mapping",
            got=message,
            do='Write it as {"role": "user", "content": "..."}.',
        )
    parsed = {key: value for key, value in message.items() if value is not None}
    if "role" not in parsed and "from" in parsed:
        parsed["role"] = parsed.pop("from")
    if "content" not in parsed and "value" in parsed:
        parsed["content"] = parsed.pop("value")
    if "role" not in parsed or not (parsed.keys() & {"content", "tool_calls"}):
        raise DataError(
            f"{where}: a message needs 'role' and 'content', or 'from' and 'value'",
            got=dict(message),
            do="Rename the keys, or remove the row.",
        )
    parsed["role"] = _role(parsed["role"], where)
    parsed.setdefault("content", "")
    if "tool_calls" in parsed:
        parsed["tool_calls"] = _tool_calls(parsed["tool_calls"], number, where)
    _check_content(parsed["content"], where)
    return parsed


def _role(role: Any, where: str) -> str:
    if isinstance(role, str):
        plain = role.strip().lower()
        plain = ROLE_ALIASES.get(plain, plain)
        if plain in ROLES:
            return plain
    raise DataError(
        f"{where}: unknown role",
        got=role,
        do=f"Rename it; known are {', '.join(ROLES)}, and ShareGPT's human and gpt.",
    )


def _tool_calls(calls: Any, number: int, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = parse_json(calls, number, "tool_calls")
    calls = pruned(calls)
    if isinstance(calls, list) and all(isinstance(call, dict) and _is_call(call) for call in calls):
        return calls
    raise DataError(
        f"{where}: 'tool_calls' must be a list of calls with 'name' and 'arguments'",
        got=calls,
        do='Write each as {"type": "function", "function": {"name": "...", "arguments": {...}}}.',
    )


def _is_call(call: dict[str, Any]) -> bool:
    function = call.get("function", call)
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if isinstance(content, Sequence) and content and all(isinstance(p, Mapping) and "type" in p for p in content):
        return
    raise DataError(
        f"{where}: the content must be text, or a list of parts with a 'type'",
        got=content,
        do="Turn it into text, or remove the row.",
    )
