"""What is trained of a row, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError
from unsloth.data.encode import Encoder, PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import Rows, encoder_of


@dataclass(frozen=True)
class Span:
    """A stretch of a row.

    Attributes:
        text: The tokens as text, control tokens included.
        trained: Whether they are trained.
        tokens: How many they are.
    """

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True)
class Preview:
    """One row as it is trained.

    Attributes:
        number: The row, counted from 0.
        spans: Its stretches, in order; neighbours differ in ``trained``.
    """

    number: int
    spans: list[Span]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(span.tokens for span in self.spans)

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained."""
        return sum(span.tokens for span in self.spans if span.trained)

    def __str__(self) -> str:
        return "".join(f"[[{span.text}]]" if span.trained else span.text for span in self.spans)


def preview(rows: Rows, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, count: int = 1) -> list[Preview]:
    """The first ``count`` rows as they are trained, not packed.

    Args:
        rows: As in :func:`unsloth.data.prepare.prepare`, but loaded.
        tokenizer: The tokenizer.
        options: How rows become tokens.
        count: How many rows.

    Raises:
        DataError: No rows, or one that cannot be used; names it.
    """
    first: list[Mapping[str, Any]] = list(islice(iter(rows), count))
    if not first:
        raise DataError("the data set has no rows")
    encoder: Encoder = encoder_of(list(first[0]), tokenizer, replace(options, packing=False))
    found = []
    for number, row in enumerate(first):
        encoded = encoder.encode([row], [number])
        found += [
            Preview(number, _spans(tokenizer, ids, labels))
            for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True)
        ]
    return found


def _spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[Span]:
    trained = [label != IGNORED for label in labels]
    starts = [i for i in range(len(ids)) if i == 0 or trained[i] != trained[i - 1]]
    ends = [*starts[1:], len(ids)]
    return [
        Span(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False), trained[start], end - start)
        for start, end in zip(starts, ends, strict=True)
    ]
