"""From rows with preferences to token ids, checked and counted.

Two layouts: pairs (``chosen`` and ``rejected``, with a ``prompt`` or with the prompt as their common beginning), and
rated answers (``prompt``, ``completion`` and a ``label`` that is true for a good one). Each side is text or a list of
messages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError
from unsloth.core.log import get_logger
from unsloth.data.conversation import Conversation, parse_messages
from unsloth.data.encode import rows_of
from unsloth.data.formats import template_variables, tools_of
from unsloth.data.passes import encoded, encoded_stream
from unsloth.data.prepare import opened
from unsloth.data.render import ChatRenderer
from unsloth.data.sources import Rows

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
RATED_COLUMNS = ("prompt_ids", "completion_ids", "label")

_Messages = list[dict[str, Any]]
_PAIRS = (
    "'chosen' and 'rejected', with a 'prompt' column or with the prompt as their common beginning, each text or a "
    "list of {'role', 'content'}"
)
_RATED = "'prompt', 'completion' and 'label' (true for a good answer), or pairs with 'chosen' and 'rejected'"
_REPAIR = "Repair the row, or leave it out: dataset.filter(lambda row: ...)."

logger = get_logger(__name__)


@dataclass(frozen=True)
class PreferenceOptions:
    """How rows become tokens.

    Attributes:
        max_length: Longest prompt with answer, in tokens; None keeps all.
        max_prompt_length: Longest prompt; a longer one loses its beginning. None keeps all.
        max_completion_length: Longest answer; a longer one loses its end. None keeps all.
        keep_end: Of rows that are still too long, cut the beginning instead of the end.
        num_proc: Worker processes; None works in this one.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    keep_end: bool = False
    num_proc: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}", got=value, do="Leave it out for no limit.")


@dataclass(frozen=True)
class PreferenceReport:
    """What became of a data set's rows.

    Attributes:
        rows: Rows received, pairs taken apart counting twice.
        kept: Rows left to train on.
        identical: Pairs with the same tokens on both sides; they state no preference, and were left out.
        filled: Rows left out because the prompt alone fills the maximum length.
        prompts_cut: Prompts that lost their beginning to ``max_prompt_length``.
        truncated: Rows of which an answer lost its end, or with ``keep_end`` the prompt its beginning.
    """

    rows: int
    kept: int
    identical: int
    filled: int
    prompts_cut: int
    truncated: int

    def __str__(self) -> str:
        text = f"{self.kept:,} of {self.rows:,} rows"
        notes = (
            (self.identical, "pairs have the same answer on both sides and were left out"),
            (self.filled, "rows have a prompt that fills the maximum length and were left out"),
            (self.prompts_cut, "prompts were longer than max_prompt_length and lost their beginning"),
            (self.truncated, "rows were longer than the maximum and were cut"),
        )
        return "; ".join([text, *(f"{count:,} {note}" for count, note in notes if count)])


def prepare_pairs(
    rows: Rows | str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, options: PreferenceOptions
) -> tuple[Dataset | IterableDataset, PreferenceReport | None]:
    """Tokenize pairs.

    Args:
        rows: A data set, a list of mappings, or what :func:`unsloth.data.sources.load_rows` can load.
        tokenizer: Tokenizer, with a chat template if the rows are messages.
        options: See :class:`PreferenceOptions`.

    Returns:
        A data set with the columns :data:`PAIR_COLUMNS`, and ``margin`` where the rows have one; and what was counted,
        or None for a streamed data set and for one that was prepared before.

    Raises:
        DataError: No rows, a missing column, a row that cannot be used (named), or nothing left to train on.
        TokenizerError: Messages without a chat template.
    """
    rows, first = opened(rows)
    columns = list(first[0])
    if set(PAIR_COLUMNS) <= set(columns):
        return _as_given(rows, PAIR_COLUMNS), None
    _require(columns, ("chosen", "rejected"), _PAIRS)
    return _prepared(rows, columns, _EncodePairs(tokenizer, options))


def prepare_rated(
    rows: Rows | str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, options: PreferenceOptions
) -> tuple[Dataset | IterableDataset, PreferenceReport | None]:
    """Tokenize rated answers; a pair becomes two of them, the chosen one good and the rejected one bad.

    As :func:`prepare_pairs`, with the columns :data:`RATED_COLUMNS`.
    """
    rows, first = opened(rows)
    columns = list(first[0])
    if set(RATED_COLUMNS) <= set(columns):
        return _as_given(rows, RATED_COLUMNS), None
    if "completion" in columns or "label" in columns:
        _require(columns, ("completion", "label"), _RATED)
        return _prepared(rows, columns, _EncodeRated(tokenizer, options))
    _require(columns, ("chosen", "rejected"), _RATED)
    return _prepared(rows, columns, _EncodeApart(tokenizer, options))


def _as_given(rows: Rows, columns: Sequence[str]) -> Dataset | IterableDataset:
    """Rows of token ids, looked at unless they are streamed."""
    if isinstance(rows, IterableDataset):
        return rows
    made = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    for name in (name for name in columns if name.endswith("_ids")):
        for number, ids in enumerate(made[name]):
            if (not ids and name != "prompt_ids") or min(ids or [0]) < 0:
                raise DataError(f"row {number}: '{name}' must be token ids, of an answer at least one", got=ids)
    return made


def _hint(columns: Sequence[str]) -> str:
    if "completion" in columns and "label" in columns:
        return "Rated answers are for KTOTrainer."
    if "messages" in columns or "conversations" in columns or "text" in columns:
        return "Rows without a preference are for SFTTrainer."
    return "Rename what has another name: dataset.rename_column(...)."


def _require(columns: Sequence[str], needed: Sequence[str], accepted: str) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"the data set has no column {' or '.join(map(repr, missing))}",
            got=list(columns),
            do=f"Needed are {accepted}. {_hint(columns)}",
        )


@dataclass(frozen=True)
class _Row:
    """Tokens of one prompt with one or two answers, and what was done to them."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: bool
    truncated: bool
    filled: bool


class _Encode:
    """A :class:`unsloth.data.encode.RowEncoder` of rows with preferences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PreferenceOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self._renderer: ChatRenderer | None = None

    @property
    def num_proc(self) -> int | None:
        return self.options.num_proc

    def __call__(self, columns: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        return self.encode(rows_of(columns, len(numbers)), numbers)

    def encode(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        made = [part for row, number in zip(rows, numbers, strict=True) for part in self.rows(row, number)]
        return {key: [row[key] for row in made] for key in made[0]}

    def rows(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """What becomes of one row."""
        raise NotImplementedError

    def tokens(self, prompt: Any, answers: Sequence[Any], row: Mapping[str, Any], number: int) -> _Row:
        """Token ids of a prompt (text or messages) and of its answers, cut to the limits."""
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token or ""
            begin = not (self.tokenizer.bos_token and prompt.startswith(self.tokenizer.bos_token))
            start = self._ids(prompt, number, begin)
            texts = [prompt + (text if text.endswith(eos) else text + eos) for text in answers]
            whole = [self._ids(text, number, begin) for text in texts]
        else:
            start = self._ids(self._text(prompt, row, number, prompt=True), number)
            whole = [self._ids(self._text(prompt + answer, row, number), number) for answer in answers]
        shared = min(_common(start, ids) for ids in whole)
        if shared < len(start):
            # Tokens that merge across the boundary, or a template that renders the end of a prompt otherwise when
            # it stands alone: the answer then starts where the two renderings part.
            logger.warning(
                "the prompt alone is not how prompt and answer begin: the answer starts %d tokens earlier (row %d)",
                len(start) - shared,
                number,
                extra={"once": True},
            )
        return self._cut(start[:shared], [ids[shared:] for ids in whole])

    def _ids(self, text: str, number: int, begin: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start : error.end]
            raise DataError(f"row {number}: half of a surrogate pair, which is no character", got=found) from None
        return list(self.tokenizer(text, add_special_tokens=begin, verbose=False)["input_ids"])

    def _text(self, messages: _Messages, row: Mapping[str, Any], number: int, prompt: bool = False) -> str:
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer)
        conversation = Conversation(messages, tools_of(row, number), template_variables(row))
        return self._renderer.render(conversation, number, add_generation_prompt=prompt).text

    def _cut(self, prompt: list[int], answers: list[list[int]]) -> _Row:
        options = self.options
        limit = options.max_prompt_length
        prompt_cut = limit is not None and len(prompt) > limit
        prompt = prompt[len(prompt) - limit :] if prompt_cut and limit is not None else prompt
        kept = [answer[: options.max_completion_length] for answer in answers]
        longest = len(prompt) + max(map(len, kept))
        if options.max_length is not None and longest > options.max_length:
            if options.keep_end:
                prompt = prompt[min(len(prompt), longest - options.max_length) :]
            kept = [answer[: max(0, options.max_length - len(prompt))] for answer in kept]
        truncated = [len(answer) for answer in kept] != [len(answer) for answer in answers]
        truncated |= options.keep_end and options.max_length is not None and longest > options.max_length
        return _Row(prompt, kept, prompt_cut, truncated, filled=not all(kept))


class _EncodePairs(_Encode):
    def rows(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        prompt, chosen, rejected = pair_of(row, number)
        pair = self.tokens(prompt, [chosen, rejected], row, number)
        return [{**_columns(pair, identical=_same(pair)), **_margin(row, number)}]


class _EncodeApart(_Encode):
    """Pairs, taken apart into one good and one bad answer."""

    def rows(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        prompt, chosen, rejected = pair_of(row, number)
        pair = self.tokens(prompt, [chosen, rejected], row, number)
        halves = []
        for answer, label in zip(pair.answers, (True, False), strict=True):
            half = _Row(pair.prompt, [answer], pair.prompt_cut, pair.truncated, pair.filled)
            halves.append({**_columns(half, identical=_same(pair)), "label": label})
        return halves


class _EncodeRated(_Encode):
    def rows(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        label = label_of(row, number)
        prompt, answer = rated_of(row, number)
        return [{**_columns(self.tokens(prompt, [answer], row, number)), "label": label}]


def _same(pair: _Row) -> bool:
    return not pair.filled and pair.answers[0] == pair.answers[1]


def _columns(row: _Row, identical: bool = False) -> dict[str, Any]:
    names = ("completion_ids",) if len(row.answers) == 1 else ("chosen_ids", "rejected_ids")
    return {
        "prompt_ids": row.prompt,
        **dict(zip(names, row.answers, strict=True)),
        "identical": identical,
        "filled": row.filled,
        "prompt_cut": row.prompt_cut,
        "truncated": row.truncated,
    }


def _margin(row: Mapping[str, Any], number: int) -> dict[str, float]:
    if "margin" not in row:
        return {}
    margin = row["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"row {number}: 'margin' must be a number", got=margin, do=_REPAIR)
    return {"margin": float(margin)}


def _prepared(
    rows: Rows, columns: list[str], encoder: _Encode
) -> tuple[Dataset | IterableDataset, PreferenceReport | None]:
    counted = ["identical", "filled", "prompt_cut", "truncated"]
    if isinstance(rows, IterableDataset):
        return encoded_stream(rows, encoder, columns).filter(_is_useful).remove_columns(counted), None
    made = encoded(rows, encoder)
    flags = {name: made[name][:] for name in counted}
    kept = [i for i in range(len(made)) if not flags["identical"][i] and not flags["filled"][i]]
    # A pair is one identical pair, also when it was taken apart.
    halves = 2 if isinstance(encoder, _EncodeApart) else 1
    report = PreferenceReport(
        rows=len(made),
        kept=len(kept),
        identical=sum(flags["identical"]) // halves,
        filled=sum(flags["filled"]),
        prompts_cut=sum(flags["prompt_cut"]),
        truncated=sum(flags["truncated"]),
    )
    if not kept:
        raise DataError(
            f"no row is left to train on: {report}",
            do="Check that chosen and rejected differ, and that max_length leaves room for an answer.",
        )
    made = made.remove_columns(counted)
    return (made if len(kept) == len(made) else made.select(kept)), report


def _is_useful(row: Mapping[str, Any]) -> bool:
    return not row["identical"] and not row["filled"]


def pair_of(row: Mapping[str, Any], number: int) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer of row ``number`` (counted from 0): all text, or all lists of messages.

    Raises:
        DataError: Names the row, and the side that is missing or of the wrong kind.
    """
    sides = [_side(row, name, number) for name in ("chosen", "rejected")]
    prompt = row.get("prompt")
    if all(isinstance(side, str) for side in sides):
        if prompt is None:
            prompt, sides = _split_texts(sides, row, number)
        if isinstance(prompt, str):
            return prompt, sides[0], sides[1]
    turns = [_turns(side) for side in sides]
    if prompt is None or (isinstance(prompt, str) and any(len(side) > 1 for side in turns)):
        # Some data sets carry the last question a second time, as text, beside whole conversations.
        start, answers = _split_turns(turns, row, number)
    else:
        start = _prompt_turns(prompt, number)
        answers = [side[len(start) :] if side[: len(start)] == start else side for side in turns]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        _check_answer(answer, name, row, number)
    return start, answers[0], answers[1]


def rated_of(row: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    """Prompt and answer of row ``number`` (counted from 0): both text, or both lists of messages.

    Raises:
        DataError: Names the row, and what is missing or of the wrong kind.
    """
    answer = _side(row, "completion", number)
    prompt = row.get("prompt")
    if isinstance(answer, str) and isinstance(prompt, str):
        return prompt, answer
    turns = _turns(answer)
    if prompt is None and len(turns) > 1:
        prompt, turns = turns[:-1], turns[-1:]
    if prompt is None:
        raise DataError(f"row {number}: 'completion' has no prompt", got=sorted(row), do="Add a 'prompt' column.")
    _check_answer(turns, "completion", row, number)
    return _prompt_turns(prompt, number), turns


def label_of(row: Mapping[str, Any], number: int) -> bool:
    """Whether the answer of row ``number`` is a good one; raise :class:`DataError` unless that is said."""
    label = row.get("label")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise DataError(f"row {number}: 'label' must be true or false", got=label, do=_REPAIR)
    return bool(label)


def _side(row: Mapping[str, Any], name: str, number: int) -> str | _Messages:
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return parse_messages(list(value), number, name)
    shown = {key: cell for key, cell in row.items() if key in ("prompt", "chosen", "rejected", "completion", "label")}
    raise DataError(f"row {number}: '{name}' is empty or no text, but must hold an answer", got=shown, do=_REPAIR)


def _turns(side: str | _Messages) -> _Messages:
    return [{"role": "assistant", "content": side}] if isinstance(side, str) else side


def _prompt_turns(prompt: Any, number: int) -> _Messages:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return parse_messages(prompt, number, "prompt")


def _check_answer(answer: _Messages, name: str, row: Mapping[str, Any], number: int) -> None:
    if answer and answer[-1].get("role") in ("user", "system"):
        raise DataError(
            f"row {number}: '{name}' ends with a message of the {answer[-1]['role']}, which is no answer",
            got=row.get(name),
            do=_REPAIR,
        )
    texts = [message.get("content") for message in answer]
    if not any((isinstance(text, str) and text.strip()) or text and not isinstance(text, str) for text in texts) and (
        not any(message.get("tool_calls") for message in answer)
    ):
        raise DataError(f"row {number}: '{name}' holds no answer", got=row.get(name), do=_REPAIR)


def _split_turns(sides: list[_Messages], row: Mapping[str, Any], number: int) -> tuple[_Messages, list[_Messages]]:
    """The turns that both sides begin with, and the rest of each."""
    shared = _common(*sides)
    if shared == min(map(len, sides)) and len(sides[0]) == len(sides[1]):
        shared -= 1  # the same conversation twice: its last turn is the answer
    if not shared:
        raise DataError(
            f"row {number}: chosen and rejected do not begin with the same message, and there is no prompt",
            got=sorted(row),
            do="Add a 'prompt' column, or let both start with the same user message.",
        )
    return sides[0][:shared], [side[shared:] for side in sides]


def _split_texts(sides: list[Any], row: Mapping[str, Any], number: int) -> tuple[str, list[Any]]:
    """The words that both sides begin with, and the rest of each, with the space before it."""
    shared = min(_common(*sides), *(len(side.rstrip()) - 1 for side in sides))
    while shared > 0 and not sides[0][shared].isspace():
        shared -= 1
    if shared <= 0:
        raise DataError(
            f"row {number}: chosen and rejected do not begin with the same text, and there is no prompt",
            got=sorted(row),
            do="Add a 'prompt' column.",
        )
    if sides[0][shared] != " ":
        shared += 1  # a line break belongs to the prompt
    return sides[0][:shared], [side[shared:] for side in sides]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    same: Callable[[tuple[Any, Any]], bool] = lambda items: items[0] == items[1]
    return sum(1 for _ in takewhile(same, zip(one, other, strict=False)))
