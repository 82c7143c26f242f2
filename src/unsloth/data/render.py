"""Calling what users bring: chat templates and formatting functions.

The one place of the data layer that may meet any exception; each is raised again with the row it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError, TokenizerError
from unsloth.data.formats import Conversation

FormattingFunction = Callable[[Mapping[str, Any]], str | list[str]]


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`TokenizerError` if the tokenizer cannot render conversations."""
    if not tokenizer.chat_template:
        raise TokenizerError(
            "the tokenizer has no chat template, which conversations need",
            got=tokenizer.name_or_path,
            do="Set tokenizer.chat_template, use an instruction-tuned model, or train on a text column.",
        )


def conversation(
    tokenizer: PreTrainedTokenizerBase, row: Conversation, number: int, add_generation_prompt: bool = False
) -> str:
    """Row ``number`` as the text that the tokenizer's chat template makes of it."""
    try:
        return tokenizer.apply_chat_template(
            row.messages, tools=row.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        roles = [message["role"] for message in row.messages]
        raise DataError(
            f"row {number}: the chat template refused the conversation with the roles {roles}: {error}"
        ) from error


def formatted(function: FormattingFunction, rows: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """The texts that a user's formatting function makes of ``rows``, one each.

    The function is called with one row and returns its text; or, if it returns a list for one row, it is taken to
    be written for a batch and called with a mapping from column to list of values.

    Args:
        function: The user's function.
        rows: Rows of the data set.
        first: Number of the first row, for messages.

    Raises:
        DataError: The function failed, or returned something that is not one text a row.
    """
    texts = [_call(function, row, first + i) for i, row in enumerate(rows[:1])]
    if texts and isinstance(texts[0], list):
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        texts = _call(function, columns, first)  # type: ignore[assignment]
    else:
        texts += [_call(function, row, first + i) for i, row in enumerate(rows[1:], start=1)]
    if not isinstance(texts, list) or len(texts) != len(rows):
        raise DataError(f"formatting_func must return one text for each of {len(rows)} rows", got=texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"row {first + i}: formatting_func must return non-empty text", got=text)
    return texts  # type: ignore[return-value]


def _call(function: FormattingFunction, argument: Mapping[str, Any], number: int) -> str | list[str]:
    try:
        return function(argument)
    except Exception as error:
        raise DataError(f"row {number}: formatting_func raised {type(error).__name__}: {error}") from error
