"""From columns to conversations, and from every spelling of conversations to one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from unsloth.core.errors import ConfigError, DataError
from unsloth.core.log import get_logger
from unsloth.data import formats, tables
from unsloth.data.conversation import is_missing, parse_messages
from unsloth.data.formats import CONVERSATION_COLUMNS

logger = get_logger(__name__)

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_COLUMN = re.compile(r"\{([^{}]+)\}")


def to_sharegpt(
    dataset: Dataset | Iterable[Mapping[str, Any]],
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Make conversations of rows with any columns.

    Args:
        dataset: The rows.
        merged_prompt: What the user says, with ``{column}`` for the value of a column. A part in ``[[`` and ``]]``
            is left out where one of its columns is empty. Without it, ``merged_column_name`` is the prompt.
        merged_column_name: The column that holds the prompt if there is no ``merged_prompt``.
        output_column_name: The column that holds the answer.
        remove_unused_columns: Keep only the conversations.
        conversation_extension: Turns of each conversation: so many rows, chosen at random, are joined. There are as
            many conversations as rows, and each row is in as many as a conversation has turns.
        random_state: Seed of that choice.

    Returns:
        A data set with a column ``conversations`` in ShareGPT's spelling, for ``standardize_sharegpt``.

    Raises:
        ConfigError: A column that is not there, or more turns than rows.
        DataError: No rows, or a row without an answer; names it.
    """
    rows = tables.as_dataset(dataset)
    if len(rows) == 0:
        raise DataError("the data set has no rows", got=rows.column_names)
    template = merged_prompt or "{" + merged_column_name + "}"
    used = _COLUMN.findall(template)
    for column in (*used, output_column_name):
        if column not in rows.column_names:
            raise ConfigError(
                f"there is no column '{column}'; the columns are {', '.join(rows.column_names)}",
                do="Name one of them in braces in merged_prompt, and the answer's in output_column_name.",
            )
    _check_extension(conversation_extension, len(rows))
    columns = {column: _as_text(rows[column][:]) for column in {*used, output_column_name}}
    turns = []
    for number in range(len(rows)):
        values = {column: columns[column][number] for column in used}
        answer = columns[output_column_name][number]
        if answer is None:
            raise DataError(
                f"row {number}: column '{output_column_name}' is empty, so there is no answer to learn",
                do=f"Remove such rows: dataset = dataset.filter(lambda row: row[{output_column_name!r}]).",
            )
        turns.append([{"from": "human", "value": _merge(template, values)}, {"from": "gpt", "value": answer}])
    empty = [number for number, (asked, _) in enumerate(turns) if not asked["value"].strip()]
    if empty:
        logger.warning("%d rows have an empty prompt, such as row %d: all its columns are empty", len(empty), empty[0])
    conversations = _extended(turns, conversation_extension, random_state)
    if remove_unused_columns:
        return Dataset.from_dict({"conversations": conversations})
    if "conversations" in rows.column_names:
        rows = rows.remove_columns("conversations")
    return rows.add_column("conversations", conversations)


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Give every message the keys ``role`` and ``content``, and every role its common name.

    Rows that are spelled so already keep all their keys. Instruction, input and output, and prompt and completion,
    become conversations too.

    Args:
        dataset: A data set, a streamed one, or a list of mappings.
        tokenizer: Accepted for compatibility; not needed.
        aliases_for_system: What else a system message's role may be called.
        aliases_for_user: What else a user's may be called.
        aliases_for_assistant: What else an assistant's may be called.
        batch_size: Rows at a time.
        num_proc: Worker processes.

    Returns:
        The data set, with its conversations in the column they were in, else in ``conversations``.

    Raises:
        DataError: No conversations, or a row that cannot be read; names it.
    """
    if not isinstance(dataset, IterableDataset):
        dataset = tables.as_dataset(dataset)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    column = next((name for name in CONVERSATION_COLUMNS if name in columns), None)
    aliases = {}
    for role, names in (
        ("system", aliases_for_system),
        ("user", aliases_for_user),
        ("assistant", aliases_for_assistant),
    ):
        aliases.update(dict.fromkeys(names, role))
    if column is None:
        return _from_columns(dataset, columns)

    def convert(values: list[Any], numbers: list[int]) -> dict[str, Any]:
        pairs = zip(values, numbers, strict=True)
        return {column: [parse_messages(_renamed(value, aliases), number, column) for value, number in pairs]}

    options: dict[str, Any] = {"batched": True, "with_indices": True, "input_columns": [column]}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc if num_proc and num_proc > 1 else None, "desc": "Standardizing"}
    return dataset.map(convert, batch_size=batch_size, **options)


standardize_data_formats = standardize_sharegpt


def _renamed(messages: Any, aliases: Mapping[str, str]) -> Any:
    if not isinstance(messages, list):
        return messages
    renamed = []
    for message in messages:
        if isinstance(message, Mapping):
            message = dict(message)
            for key in ("role", "from"):
                if isinstance(message.get(key), str):
                    message[key] = aliases.get(message[key], message[key])
        renamed.append(message)
    return renamed


def _from_columns(dataset: Any, columns: list[str]) -> Any:
    detection = formats.detect(columns)
    if detection.layout not in ("alpaca", "completion"):
        raise DataError(
            "the data set has no conversations",
            got=columns,
            do=f"They are looked for in {', '.join(CONVERSATION_COLUMNS)}; to_sharegpt makes them of other columns.",
        )

    def convert(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        if detection.layout == "alpaca":
            return {"conversations": formats.conversation_of(row, number, detection).messages}
        prompt, completion = formats.completion_of(row, number, detection)
        if isinstance(prompt, str):
            prompt, completion = (
                [{"role": role, "content": text}] for role, text in (("user", prompt), ("assistant", completion))
            )
        return {"conversations": prompt + completion}

    return dataset.map(convert, with_indices=True, remove_columns=columns)


def _check_extension(turns: int, rows: int) -> None:
    if not isinstance(turns, int) or turns < 1:
        raise ConfigError("conversation_extension must be at least 1", got=turns)
    if turns > rows:
        raise ConfigError(f"conversation_extension must be at most the number of rows, {rows}", got=turns)


def _as_text(values: list[Any]) -> list[str | None]:
    """Cells as text, empty ones as None. Whole numbers that a gap in the column turned into floats stay whole."""
    floats = [value for value in values if isinstance(value, float) and not is_missing(value)]
    whole = len(floats) < len(values) and all(value.is_integer() for value in floats)

    def text(value: Any) -> str | None:
        if is_missing(value):
            return None
        return str(int(value)) if isinstance(value, float) and whole else str(value)

    return [text(value) for value in values]


def _merge(template: str, values: Mapping[str, str | None]) -> str:
    """Fill the columns in; an optional part with an empty column vanishes, and one space beside it."""
    text, position = "", 0
    for part in _OPTIONAL.finditer(template):
        text += _fill(template[position : part.start()], values)
        position = part.end()
        if all(values[column] is not None for column in _COLUMN.findall(part[1])):
            text += _fill(part[1], values)
        elif not text or text[-1].isspace():
            if template[position : position + 1] == " ":
                position += 1
            elif position == len(template):
                text = text.rstrip(" ")
    return text + _fill(template[position:], values)


def _fill(text: str, values: Mapping[str, str | None]) -> str:
    return _COLUMN.sub(lambda found: values[found[1]] or "", text)


def _extended(turns: list[list[dict[str, str]]], count: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of ``count`` different rows each, in which every row is used equally often."""
    if count == 1:
        return turns
    draw = random.Random(seed)
    order = list(range(len(turns)))
    draw.shuffle(order)
    steps = sorted(draw.sample(range(1, len(turns)), count - 1))
    conversations = []
    for place, row in enumerate(order):
        others = [order[(place + step) % len(order)] for step in steps]
        draw.shuffle(others)
        conversations.append([message for turn in (row, *others) for message in turns[turn]])
    return conversations
