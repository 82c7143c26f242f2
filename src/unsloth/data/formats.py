"""The layouts of rows that can be trained on, and how they are recognized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unsloth.core.errors import DataError

Layout = Literal["tokens", "conversation", "text"]

CONVERSATION_COLUMNS = ("messages", "conversations")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ACCEPTED = (
    "a text column; 'messages' (or 'conversations') with a list of {'role', 'content'} or {'from', 'value'}; "
    "or 'input_ids' with an optional 'labels'"
)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each a mapping with at least ``role`` and ``content``; and the tools on offer, if any."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def detect(columns: Sequence[str], text_field: str) -> Layout:
    """Recognize the layout of a data set by its columns.

    Args:
        columns: The data set's column names.
        text_field: Name of the column that holds text, where there is one.

    Raises:
        DataError: No known layout; says which columns were found and which layouts are accepted.
    """
    if "input_ids" in columns:
        return "tokens"
    if text_field in columns:
        return "text"
    if any(name in columns for name in CONVERSATION_COLUMNS):
        return "conversation"
    raise DataError(
        f"the data set has neither a '{text_field}' column nor conversations",
        got=list(columns),
        do=f"Accepted are {_ACCEPTED}. Name another text column with dataset_text_field=..., "
        "or build the text with formatting_func=...",
    )


def text_of(row: Mapping[str, Any], text_field: str, number: int) -> str:
    """The text of row ``number`` (counted from 0); raise :class:`DataError` unless it is a non-empty string."""
    text = row[text_field]
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"row {number}: column '{text_field}' must hold non-empty text",
            got=text,
            do="Remove or repair the row: dataset.filter(lambda row: row[...]).",
        )
    return text


def conversation_of(row: Mapping[str, Any], number: int) -> Conversation:
    """The conversation of row ``number`` (counted from 0), with ShareGPT's keys and roles translated.

    Raises:
        DataError: Names the row, the message and what is wrong with it.
    """
    column = next(name for name in CONVERSATION_COLUMNS if name in row)
    messages = row[column]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"row {number}: '{column}' must be a non-empty list of messages", got=messages)
    parsed = [_message(message, number, position) for position, message in enumerate(messages)]
    return Conversation(parsed, row.get("tools") or None)


def _message(message: Any, number: int, position: int) -> dict[str, Any]:
    where = f"row {number}, message {position}"
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message must be a mapping with 'role' and 'content'", got=message)
    if "role" in message:
        parsed = {key: value for key, value in message.items() if value is not None}
    elif "from" in message and "value" in message:
        role = message["from"]
        parsed = {"role": _SHAREGPT_ROLES.get(role, role), "content": message["value"]}
    else:
        raise DataError(
            f"{where}: a message needs 'role' and 'content', or 'from' and 'value'", got=sorted(map(str, message))
        )
    if not isinstance(parsed.get("role"), str):
        raise DataError(f"{where}: the role must be text", got=parsed.get("role"))
    if not isinstance(parsed.get("content"), str) and not parsed.get("tool_calls"):
        raise DataError(f"{where}: the content must be text", got=message.get("content", message.get("value")))
    return parsed
