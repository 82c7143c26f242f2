"""The text on which the quantizers measure what matters in a model: the user's own, or a small set that ships."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError
from unsloth.data import calibration, formats, sources
from unsloth.data.encode import Encoder, PrepareOptions
from unsloth.data.sources import Rows
from unsloth.models import record
from unsloth.models.record import transformers_model

Source: TypeAlias = "Rows | str | os.PathLike[str]"
"""Rows in any layout that can be trained on, token ids among them; or the name of a file, folder or data set."""

SHIPPED = "the calibration conversations that ship with unsloth"
TRAINED = "the rows of the training run"
_CHUNK = 512  # tokens
_MOST_ROWS = 4096  # of a large data set are looked at


@dataclass(frozen=True)
class Text:
    """Text to measure on.

    Attributes:
        source: Where it is from, for the file.
        chunks: Token ids, each [T] int64; all but the last have the same length.
    """

    source: str
    chunks: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(chunk) for chunk in self.chunks)


def of_model(
    model: torch.nn.Module, source: Source | None, tokenizer: PreTrainedTokenizerBase, *, tokens: int = 16_384
) -> Text:
    """The text to measure a model on.

    Args:
        model: The model.
        source: See :data:`Source`; None takes the rows that the model was trained on in this process, if it was, else
            the set that ships.
        tokenizer: Of the model.
        tokens: The most tokens.

    Raises:
        UnslothError: As :func:`read` does.
    """
    longest = getattr(transformers_model(model).config.get_text_config(), "max_position_embeddings", None)
    length = min(_CHUNK, longest or _CHUNK)
    rows = record.kept_rows(model) if source is None else None
    if rows is None:
        return read(source, tokenizer, tokens=tokens, length=length)
    return replace(read(rows, tokenizer, tokens=tokens, length=length), source=TRAINED)


def read(
    source: Source | None, tokenizer: PreTrainedTokenizerBase, *, tokens: int = 16_384, length: int = _CHUNK
) -> Text:
    """Render and tokenize rows as training does, one after another, and cut what comes into chunks.

    Of more than 4,096 rows of a data set, as many are taken at equal distances.

    Args:
        source: See :data:`Source`; None takes the set that ships.
        tokenizer: Of the model, with its chat template if the rows are conversations.
        tokens: The most tokens.
        length: Of a chunk, in tokens.

    Raises:
        ConfigError: A number that is not positive.
        DataError: No rows, or rows that cannot be trained on; a file that cannot be read.
        TokenizerError: Conversations without a chat template.
    """
    if tokens < 1 or length < 2:
        raise ConfigError("calibration takes at least 1 token and chunks of 2", got=(tokens, length))
    ids: list[int] = []
    for row in _tokens(_rows(source, tokenizer), tokenizer):
        ids += row
        if len(ids) >= tokens:
            break
    if len(ids) < 2:
        raise DataError("the calibration data has no text", got=source, do="Pass rows like those the model is for.")
    pieces = torch.tensor(ids[:tokens]).split(length)
    return Text(_name(source), tuple(piece for piece in pieces if len(piece) > 1))


def _name(source: Source | None) -> str:
    if source is None:
        return SHIPPED
    return os.path.basename(os.fspath(source)) if isinstance(source, str | os.PathLike) else type(source).__name__


def _rows(source: Source | None, tokenizer: PreTrainedTokenizerBase) -> Rows:
    if source is None:
        rows = calibration.rows()
        return rows if tokenizer.chat_template else [{"text": calibration.plain(row)} for row in rows]
    return sources.load_rows(source) if isinstance(source, str | os.PathLike) else source


def _tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each row, of whatever layout."""
    encoder = None
    for number, row in enumerate(_some(rows)):
        if encoder is None:
            detection = formats.detect(list(row))
            formats.refuse_for_sft(detection, list(row))
            encoder = Encoder(tokenizer, detection, PrepareOptions(max_length=None))
        for ids in encoder.encode([row], [number])["input_ids"]:
            yield [int(token) for token in ids]


def _some(rows: Rows) -> Iterator[Mapping[str, Any]]:
    if isinstance(rows, Dataset | Sequence) and len(rows) > _MOST_ROWS:
        step = len(rows) / _MOST_ROWS
        yield from (rows[int(number * step)] for number in range(_MOST_ROWS))
    else:
        yield from rows
