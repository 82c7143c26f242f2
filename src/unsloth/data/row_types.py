"""Rows of every layout as conversations, each named by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsloth.core.errors import DataError
from unsloth.data import formats, preference
from unsloth.data.conversation import Conversation, is_missing, parse_messages
from unsloth.data.formats import Detection


def conversations_of(row: Mapping[str, Any], number: int, detection: Detection) -> dict[str, Conversation]:
    """The conversations of row ``number`` (counted from 0).

    Args:
        row: The row.
        number: Its number, for messages of errors.
        detection: What the rows are.

    Returns:
        ``{"conversation"}`` of rows with one conversation, ``{"chosen", "rejected"}`` of pairs, ``{"good"}`` or
        ``{"bad"}`` of a judged answer, ``{"prompt"}`` of a question without an answer to learn. Text is the user's
        before an answer, and the assistant's in it.

    Raises:
        DataError: Names the row and what is wrong; or the layout has no conversations.
    """
    if detection.layout in ("conversation", "alpaca"):
        return {"conversation": formats.conversation_of(row, number, detection)}
    if detection.layout == "completion":
        return {"conversation": _joined(*formats.completion_of(row, number, detection), row, number)}
    if detection.layout == "preference":
        prompt, chosen, rejected = preference.pair_of(row, number)
        return {
            "chosen": _joined(prompt, chosen, row, number),
            "rejected": _joined(prompt, rejected, row, number),
        }
    if detection.layout == "unpaired":
        named = {**row, "completion": row.get(detection.columns["completion"])}
        kind = "good" if preference.label_of(row, number) else "bad"
        return {kind: _joined(*preference.rated_of(named, number), row, number)}
    if detection.layout == "prompt":
        return {"prompt": _question(row, number, detection)}
    raise DataError(f"rows of the layout '{detection.layout}' are not conversations")


def answer_of(row: Mapping[str, Any], detection: Detection) -> str | None:
    """The answer that rewards compare with, of a row with a question, as text; None if it has none."""
    column = detection.columns.get("answer")
    value = row.get(column) if column else None
    return None if is_missing(value) else str(value)


def _question(row: Mapping[str, Any], number: int, detection: Detection) -> Conversation:
    column = detection.columns["prompt"]
    prompt = row.get(column)
    if is_missing(prompt):
        raise DataError(f"row {number}: column '{column}' must hold a question", got=prompt, do="Remove the row.")
    messages = _turns(prompt, "user", number, column)
    if isinstance(prompt, str) and isinstance(row.get("system"), str) and not is_missing(row["system"]):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Conversation(messages, formats.tools_of(row, number), formats.template_variables(row))


def _joined(prompt: Any, answer: Any, row: Mapping[str, Any], number: int) -> Conversation:
    messages = _turns(prompt, "user", number, "prompt") if prompt else []
    messages += _turns(answer, "assistant", number, "completion")
    return Conversation(messages, formats.tools_of(row, number), formats.template_variables(row))


def _turns(side: Any, role: str, number: int, column: str) -> list[dict[str, Any]]:
    if isinstance(side, str):
        return [{"role": role, "content": side}]
    return parse_messages(side, number, column)
