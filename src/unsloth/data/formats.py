"""The layouts of rows that can be trained on, and how they are recognized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from unsloth.core.errors import ConfigError, DataError
from unsloth.data.conversation import Conversation, is_missing, parse_json, parse_messages, pruned

Layout = Literal["tokens", "text", "conversation", "alpaca", "completion", "preference", "unpaired", "prompt"]

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
TEMPLATE_COLUMNS = ("reasoning_effort", "enable_thinking", "documents")
"""Columns that are passed on to the chat template, row by row."""

ACCEPTED = (
    "a text column; 'messages' or 'conversations' with a list of {'role', 'content'} or {'from', 'value'}; "
    "'instruction', 'output' and optionally 'input'; 'prompt' and 'completion'; 'input_ids' and optionally 'labels'"
)
_REMOVE = "Remove such rows: dataset = dataset.filter(lambda row: isinstance(row['{0}'], str) and row['{0}'].strip())."
# Names that other libraries and data sets use for the two columns of a completion.
_PROMPTS = ("prompt",)
_COMPLETIONS = ("completion", "response")
# Of questions whose answers are compared with, not learned.
_QUESTIONS = ("prompt", "question", "problem", "query")
_ANSWERS = ("answer", "solution", "ground_truth", "target", "expected_answer")
TRAINERS: Mapping[str, str] = {
    "preference": "These rows are pairs for preference training: use DPOTrainer or ORPOTrainer.",
    "unpaired": "These rows are judged answers: use KTOTrainer.",
    "prompt": "These rows have no answer to learn by heart: use GRPOTrainer, or rename the columns to "
    "'instruction' and 'output'.",
}
"""Which trainer rows are for that supervised fine-tuning does not take."""


@dataclass(frozen=True)
class Detection:
    """What a data set's rows are.

    Attributes:
        layout: The layout.
        reason: By which columns it was recognized.
        columns: The columns that are used, by what they are used for.
    """

    layout: Layout
    reason: str
    columns: Mapping[str, str] = field(default_factory=dict)


def detect(columns: Sequence[str], text_field: str = "text", layout: Layout | None = None) -> Detection:
    """Recognize the layout of a data set by its columns.

    Args:
        columns: The data set's column names.
        text_field: Name of the column that holds text, where there is one.
        layout: Overrides the recognition; the columns it needs must be there.

    Raises:
        ConfigError: No such layout.
        DataError: No known layout; says which columns were found and which layouts are accepted.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ConfigError(f"layout must be one of {', '.join(get_args(Layout))}", got=layout)
    found = {d.layout: d for d in _candidates(list(columns), text_field)}
    if layout is not None:
        if layout in found:
            return found[layout]
        raise DataError(f"the rows do not have the columns of the layout '{layout}'", got=list(columns))
    if found:
        return next(iter(found.values()))
    raise DataError(
        f"the data set has neither a '{text_field}' column nor another known layout",
        got=list(columns),
        do=f"Accepted are {ACCEPTED}. Name another text column with dataset_text_field=..., "
        "or build the text with formatting_func=...",
    )


def _candidates(columns: list[str], text_field: str) -> list[Detection]:
    """The layouts that fit, the likeliest first."""
    have = set(columns)
    found = []

    def add(layout: Layout, reason: str, **used: str | None) -> None:
        found.append(Detection(layout, reason, {key: value for key, value in used.items() if value}))

    if "input_ids" in have:
        add("tokens", "the column 'input_ids'", input_ids="input_ids")
    if text_field in have:
        add("text", f"the column '{text_field}'", text=text_field)
    messages = _first(CONVERSATION_COLUMNS, have)
    if messages:
        add("conversation", f"the column '{messages}'", messages=messages, tools=_first(("tools",), have))
    if {"chosen", "rejected"} <= have:
        add("preference", "the columns 'chosen' and 'rejected'", prompt=_first(_PROMPTS, have))
    prompt, completion = _first(_PROMPTS, have), _first(_COMPLETIONS, have)
    if completion and "label" in have:
        beside = f"the columns '{prompt}', '{completion}' and 'label'" if prompt else f"'{completion}' beside 'label'"
        add("unpaired", beside, prompt=prompt, completion=completion)
    if {"instruction", "output"} <= have:
        add("alpaca", "the columns 'instruction' and 'output'", input=_first(("input",), have))
    if prompt and completion:
        add("completion", f"the columns '{prompt}' and '{completion}'", prompt=prompt, completion=completion)
    question = _first(_QUESTIONS, have)
    if question:
        answer = _first(_ANSWERS, have)
        beside = f"'{question}' with '{answer}'" if answer else f"the column '{question}' without a completion"
        add("prompt", beside, prompt=question, answer=answer)
    return found


def _first(names: Sequence[str], have: set[str]) -> str | None:
    return next((name for name in names if name in have), None)


def refuse_for_sft(detection: Detection, columns: Sequence[str]) -> None:
    """Raise :class:`DataError` if rows of this layout belong to another trainer."""
    if detection.layout in TRAINERS:
        raise DataError(
            f"rows with {detection.reason} are not for supervised fine-tuning",
            got=list(columns),
            do=f"{TRAINERS[detection.layout]} Accepted here are {ACCEPTED}.",
        )


def text_of(row: Mapping[str, Any], text_field: str, number: int) -> str:
    """The text of row ``number`` (counted from 0); raise :class:`DataError` unless it is a non-empty string."""
    text = row.get(text_field)
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"row {number}: column '{text_field}' must hold non-empty text",
            got=text,
            do=_REMOVE.format(text_field),
        )
    return text


def conversation_of(row: Mapping[str, Any], number: int, detection: Detection | None = None) -> Conversation:
    """The conversation of row ``number`` (counted from 0): messages, or instruction, input and output.

    Raises:
        DataError: Names the row, the message and what is wrong with it.
    """
    detection = detection or detect(list(row))
    variables = template_variables(row)
    if detection.layout == "alpaca":
        return Conversation(_alpaca(row, number), None, variables)
    column = detection.columns["messages"]
    return Conversation(parse_messages(row.get(column), number, column), tools_of(row, number), variables)


def completion_of(row: Mapping[str, Any], number: int, detection: Detection) -> tuple[Any, Any]:
    """Prompt and completion of row ``number``: both text, or both lists of messages.

    Raises:
        DataError: They are missing or of two kinds.
    """
    columns = [detection.columns[name] for name in ("prompt", "completion")]
    prompt, completion = (_cell(row.get(column)) for column in columns)
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return prompt, completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return parse_messages(prompt, number, columns[0]), parse_messages(completion, number, columns[1])
    raise DataError(
        f"row {number}: '{columns[0]}' and '{columns[1]}' must both be text, or both lists of messages",
        got={column: row.get(column) for column in columns},
        do="Remove or repair the row.",
    )


def _alpaca(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    asked, answer = (_cell(row.get(column)) for column in ("instruction", "output"))
    for column, cell in (("instruction", asked), ("output", answer)):
        if not isinstance(cell, str) or is_missing(cell):
            raise DataError(
                f"row {number}: column '{column}' must hold non-empty text",
                got=row.get(column),
                do=_REMOVE.format(column),
            )
    if not is_missing(row.get("input")):
        asked = f"{asked}\n\n{row['input']}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if isinstance(row.get("system"), str) and not is_missing(row["system"]):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _cell(value: Any) -> Any:
    """A cell, a number in it as the text it is: tables read a column of numbers as numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value)
    return str(value) if is_number else value


def refuse_images(row: Mapping[str, Any], number: int) -> None:
    """Raise :class:`DataError` if row ``number`` brings images, which a text model would not see."""
    for column in ("images", "image"):
        if row.get(column):
            raise DataError(
                f"row {number}: column '{column}' holds images, which this text model cannot take",
                do=f"Use a vision model with FastVisionModel, or dataset.remove_columns({column!r}).",
            )


def template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What ``row`` passes on to the chat template."""
    return {name: row[name] for name in TEMPLATE_COLUMNS if row.get(name) is not None}


def tools_of(row: Mapping[str, Any], number: int) -> list[dict[str, Any]] | None:
    """The tools that row ``number`` offers; raise :class:`DataError` unless they are a list of JSON schemas."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = parse_json(tools, number, "tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"row {number}: 'tools' must be a list of JSON schemas", got=tools)
    return pruned(tools)
