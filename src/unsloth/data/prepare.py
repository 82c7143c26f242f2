"""From a data set of rows to a data set of token ids and labels, checked and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError
from unsloth.core.log import get_logger
from unsloth.data import encode, formats, masking, packing, render, sources, tables, token_cache
from unsloth.data.encode import Encoder, PrepareOptions
from unsloth.data.json_rows import LazyRows, as_row
from unsloth.data.passes import encoded, encoded_stream, of_table
from unsloth.data.sources import Rows
from unsloth.data.turns import end_token

__all__ = ["PrepareOptions", "PrepareReport", "Rows", "prepare"]

_LOOK_AT = 8  # rows looked at before the work begins
_PACKED_ROWS = 4096  # joined at a time

logger = get_logger(__name__)


@dataclass(frozen=True)
class PrepareReport:
    """What became of a data set's rows.

    Attributes:
        rows: Rows received.
        dropped: Rows without a trained token, left out.
        truncated: Rows cut at the maximum length.
        tokens: Tokens of all rows kept.
        trained_tokens: Those of them that are trained.
        batches_rows: Rows after packing, or after long ones were cut into several.
        too_long: Rows above the maximum length, left out as asked.
        control: Rows with the name of a control token within a message.
        double_bos: Rows that began with two begin-of-text tokens; one was removed.
        silent: Rows with an assistant's turn that says nothing; it is not trained.
        unwritten: Rows with a thought, a tool call or a tool that the chat template leaves out.
    """

    rows: int
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int
    batches_rows: int
    too_long: int = 0
    control: int = 0
    double_bos: int = 0
    silent: int = 0
    unwritten: int = 0

    def __str__(self) -> str:
        share = self.trained_tokens / max(self.tokens, 1)
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {share:.0%} of them trained"
        if self.batches_rows < self.rows - self.dropped - self.too_long:
            text += f", packed into {self.batches_rows:,} rows"
        notes = {
            "were longer than the maximum and lost their end": self.truncated,
            "were longer than the maximum and were left out": self.too_long,
            "had no token to train and were left out": self.dropped,
            "began with two begin-of-text tokens, of which one was removed": self.double_bos,
            "have an empty answer, which is not trained": self.silent,
            "have thoughts, tool calls or tools that the chat template does not write": self.unwritten,
            "have the name of a control token within a message (escape_control_tokens writes it as text)": self.control,
        }
        return text + "".join(f"; {count:,} rows {note}" for note, count in notes.items() if count)


def prepare(
    rows: Rows | str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, options: PrepareOptions
) -> tuple[Dataset | IterableDataset, PrepareReport | None]:
    """Tokenize, mask, truncate and pack a data set.

    Args:
        rows: A data set, a list of mappings, or what :func:`unsloth.data.sources.load_rows` can load. Rows of a list
            may differ in their columns within a layout.
        tokenizer: Tokenizer, with a chat template if the rows are conversations.
        options: See :class:`PrepareOptions`.

    Returns:
        A data set with the columns ``input_ids`` and ``labels`` (and ``seq_lengths`` if packed or padding-free),
        and what was counted on the way; for a streamed data set, which is prepared as it is read, None.

    Raises:
        DataError: No rows, an unknown layout, a row that cannot be used, or nothing left to train.
        TokenizerError: Conversations without a chat template.
    """
    rows, first = opened(rows)
    encoder = encoder_of(list(first[0]), tokenizer, options)
    _look_at_first_rows(encoder, first)
    if isinstance(rows, IterableDataset):
        return _streamed(rows, encoder, first), None
    kept_as = token_cache.key(rows, tokenizer, options) if options.cache else None
    found = token_cache.find(kept_as) if kept_as else None
    if found is not None:
        return found[0], PrepareReport(**found[1])
    dataset, report = _finish(encoded(rows, encoder), len(rows), encoder, first)
    if kept_as:
        token_cache.keep(kept_as, dataset, asdict(report))
    return dataset, report


def opened(rows: Rows | str | os.PathLike[str]) -> tuple[Rows, list[Mapping[str, Any]]]:
    """``rows`` as something to encode, loaded if they are named, and the first few of them.

    Raises:
        DataError: No rows, or nothing that holds rows.
    """
    rows = _checked(sources.load_rows(rows) if isinstance(rows, str | os.PathLike) else rows)
    first = list(islice(_guarded(rows), _LOOK_AT))
    if not first:
        raise DataError(
            "the data set has no rows", got=_columns(rows), do="Check the file, and any filter applied to it."
        )
    return rows, first


def _checked(rows: Rows) -> Rows:
    if isinstance(rows, Dataset | IterableDataset):
        return tables.undecoded(rows)
    if tables.is_frame(rows):
        return tables.as_dataset(rows)
    if isinstance(rows, LazyRows):
        return rows
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        return [as_row(row, f"row {number}") for number, row in enumerate(rows)]
    what = "is a dictionary of splits; pass one of them" if isinstance(rows, Mapping) else "has the wrong type"
    raise DataError(
        f"train_dataset {what}",
        got=sorted(map(str, rows)) if isinstance(rows, Mapping) else type(rows).__name__,
        do='Pass a datasets.Dataset or a list of mappings, such as dataset["train"].',
    )


def _columns(rows: Rows) -> list[str]:
    return list(getattr(rows, "column_names", None) or [])


def _guarded(rows: Rows) -> Iterator[Any]:
    return render.guarded(rows) if isinstance(rows, IterableDataset) else iter(rows)


def encoder_of(columns: list[str], tokenizer: PreTrainedTokenizerBase, options: PrepareOptions) -> Encoder:
    """The encoder for rows with these columns.

    Raises:
        DataError: No layout that supervised fine-tuning takes.
        TokenizerError: The tokenizer lacks what the rows need.
    """
    if options.formatting:
        return Encoder(tokenizer, formats.Detection("text", "formatting_func"), options)
    detection = formats.detect(columns, options.text_field, options.layout)
    formats.refuse_for_sft(detection, columns)
    logger.debug("rows are read as %s, because of %s", detection.layout, detection.reason)
    return Encoder(tokenizer, detection, options)


def _look_at_first_rows(encoder: Encoder, first: list[Mapping[str, Any]]) -> None:
    """Say what would go wrong quietly: an answer that never ends, or ends with another token than generation."""
    if encoder.reader is None:
        return
    tokenizer = encoder.tokenizer
    looking = Encoder(
        tokenizer,
        encoder.detection,
        replace(encoder.options, train_on="last_response", responses=None, max_length=None, packing=False),
    )
    labels = [row for row in looking.encode(first, range(len(first)))["labels"] if masking.count_trained(row)]
    ends = Counter(end_token(tokenizer, row) for row in labels)
    if not ends:
        return
    end, count = ends.most_common(1)[0]
    if end is None:
        logger.warning(
            "%d of the first %d answers do not end with a token that ends a turn: the model would not learn to stop. "
            "Set a template that writes one, such as tokenizer = get_chat_template(tokenizer, 'chatml')",
            count,
            len(labels),
        )
    elif end != tokenizer.eos_token:
        logger.warning(
            "answers end with %r, but tokenizer.eos_token is %r, where generation would stop instead. "
            "Set tokenizer.eos_token = %r, or use get_chat_template with map_eos_token=True",
            end,
            tokenizer.eos_token,
            end,
        )


def _streamed(rows: IterableDataset, encoder: Encoder, first: list[Mapping[str, Any]]) -> IterableDataset:
    if encoder.options.packing:
        raise ConfigError("packing needs a data set of known length", got="a streamed data set")
    labels = encoder.encode(first, range(len(first)))["labels"]
    if not any(masking.count_trained(row) for row in labels):
        raise _nothing_to_train(encoder, first)
    return encoded_stream(rows, encoder, list(first[0])).remove_columns("flags").filter(_is_trained)


def _is_trained(row: Mapping[str, Any]) -> bool:
    return masking.count_trained(row["labels"]) > 0


def _finish(
    encoded: Dataset, received: int, encoder: Encoder, first: list[Mapping[str, Any]]
) -> tuple[Dataset, PrepareReport]:
    """Drop rows without a trained token, count, and pack."""
    options = encoder.options
    flags = np.array(encoded["flags"][:])
    encoded = encoded.remove_columns("flags")
    lengths, trained = measure(encoded)
    too_long = (flags & encode.DROPPED) > 0
    kept = np.flatnonzero((trained > 0) & ~too_long)
    if not len(kept):
        raise _nothing_to_train(encoder, first)
    dropped = int(((trained == 0) & ~too_long).sum())
    if len(kept) < len(flags):
        encoded = encoded.select(kept)
    lengths = lengths[kept]
    if options.packing and options.max_length is not None:
        encoded = _pack(encoded, lengths, options.pack_length or options.max_length)
    report = PrepareReport(
        rows=received,
        dropped=dropped,
        truncated=int(((flags & encode.TRUNCATED) > 0).sum()),
        tokens=int(lengths.sum()),
        trained_tokens=int(trained[kept].sum()),
        batches_rows=len(encoded),
        too_long=int(too_long.sum()),
        control=int(((flags & encode.CONTROL) > 0).sum()),
        double_bos=int(((flags & encode.DOUBLE_BOS) > 0).sum()),
        silent=int(((flags & encode.SILENT) > 0).sum()),
        unwritten=int(((flags & encode.UNWRITTEN) > 0).sum()),
    )
    return encoded, report


def measure(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the number of tokens, and of trained tokens (its first one never is)."""
    lengths, trained = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for chunk in encoded.data.column("labels").chunks:
        starts = chunk.offsets.to_numpy()
        is_trained = chunk.values.to_numpy(zero_copy_only=False) != masking.IGNORED
        sums = np.concatenate([[0], is_trained.cumsum()])
        sizes = np.diff(starts)
        lengths.append(sizes)
        trained.append(sums[starts[1:]] - sums[starts[:-1] + (sizes > 0)])
    return np.concatenate(lengths), np.concatenate(trained)


def _pack(encoded: Dataset, lengths: np.ndarray, capacity: int) -> Dataset:
    """Documents joined to rows, some thousand rows at a time, so that little is held beside the result."""
    rows = packing.pack(lengths.tolist(), capacity)
    tables = []
    for start in range(0, len(rows), _PACKED_ROWS):
        part = rows[start : start + _PACKED_ROWS]
        documents = np.array([document for row in part for document in row])
        taken = encoded.with_format("arrow")[documents]
        ends = np.cumsum([0, *map(len, part)])
        sizes = lengths[documents].astype(np.int32)
        tokens = np.concatenate([[0], np.cumsum(sizes)])[ends]
        columns = {name: _joined(taken.column(name), tokens) for name in ("input_ids", "labels")}
        columns["seq_lengths"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(sizes))
        tables.append(pa.table(columns))
    return of_table(pa.concat_tables(tables))


def _joined(column: pa.ChunkedArray, ends: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), column.combine_chunks().flatten())


def _nothing_to_train(encoder: Encoder, first: list[Mapping[str, Any]]) -> DataError:
    """Explain with the first row why no token is trained."""
    options = encoder.options
    plain = Encoder(
        encoder.tokenizer,
        encoder.detection,
        replace(options, train_on="all", responses=None, max_length=None, packing=False),
    )
    rendered = encoder.tokenizer.decode(plain.encode(first[:1], [0])["input_ids"][0])
    if options.train_on == "all":
        return DataError(f"no row has a token to train; the first row is:\n{rendered}\n", do="Check the labels.")
    if encoder.markers is None:
        return DataError(
            f"no row has a token to train: no answer of the assistant lies within {options.max_length} tokens; "
            f"the first row is:\n{rendered}\n",
            do="Check the roles, or raise the maximum length.",
        )
    return DataError(
        f"no row has a token to train: {encoder.markers.response!r} was not found, or nothing followed it within "
        f"{options.max_length} tokens; the first row is:\n{rendered}\n",
        do="Check instruction_part and response_part against it, or raise the maximum length.",
    )
