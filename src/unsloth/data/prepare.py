"""From a data set of rows to a data set of token ids and labels, checked and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.core.log import get_logger
from unsloth.data import formats, masking, packing, render
from unsloth.data.masking import IGNORED, ResponseMarkers

Rows: TypeAlias = "Dataset | IterableDataset | Sequence[Mapping[str, Any]]"

_BATCH = 256  # rows tokenized at a time

logger = get_logger(__name__)


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become tokens.

    Attributes:
        max_length: Longest row in tokens; longer ones are cut at the end, and counted. None keeps all.
        text_field: Column that holds text.
        formatting: A user's function that makes the text of a row.
        responses: Train only the assistant's turns, told apart by these markers.
        packing: Let several documents share a row of ``max_length`` tokens.
        padding_free: Mark rows so that a batch is collated without padding.
        append_eos: End each row of a text column with the end-of-text token.
        num_proc: Worker processes; None works in this one.
    """

    max_length: int | None
    text_field: str = "text"
    formatting: render.FormattingFunction | None = None
    responses: ResponseMarkers | None = None
    packing: bool = False
    padding_free: bool = False
    append_eos: bool = True
    num_proc: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError("max_length must be at least 2 tokens", got=self.max_length)
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs a row length", got=None, do="Set max_length=...")


@dataclass(frozen=True)
class PrepareReport:
    """What became of a data set's rows.

    Attributes:
        rows: Rows received.
        dropped: Rows without a trained token, left out.
        truncated: Rows cut at the maximum length.
        tokens: Tokens of all rows kept.
        trained_tokens: Those of them that are trained.
        batches_rows: Rows after packing.
    """

    rows: int
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int
    batches_rows: int

    def __str__(self) -> str:
        share = self.trained_tokens / max(self.tokens, 1)
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {share:.0%} of them trained"
        if self.batches_rows != self.rows - self.dropped:
            text += f", packed into {self.batches_rows:,} rows"
        if self.truncated:
            text += f"; {self.truncated:,} rows were longer than the maximum and lost their end"
        if self.dropped:
            text += f"; {self.dropped:,} rows had no token to train and were left out"
        return text


def prepare(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions
) -> tuple[Dataset | IterableDataset, PrepareReport | None]:
    """Tokenize, mask, truncate and pack a data set.

    Args:
        rows: A data set, or a list of mappings.
        tokenizer: Tokenizer, with a chat template if the rows are conversations.
        options: See :class:`PrepareOptions`.

    Returns:
        A data set with the columns ``input_ids`` and ``labels`` (and ``seq_lengths`` if packed or padding-free),
        and what was counted on the way; for a streamed data set, which is prepared as it is read, None.

    Raises:
        DataError: No rows, an unknown layout, a row that cannot be used, or nothing left to train.
        TokenizerError: Conversations without a chat template.
    """
    dataset = as_dataset(rows)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("the data set has no rows", do="Check the file, and any filter applied to it.")
    columns = list(first)
    layout = "text" if options.formatting else formats.detect(columns, options.text_field)
    _check_tokenizer(tokenizer, layout, options)
    tokenize = _Tokenize(tokenizer, layout, options)
    if isinstance(dataset, IterableDataset):
        if options.packing:
            raise ConfigError("packing needs a data set of known length", got="a streamed data set")
        streamed = dataset.map(tokenize, with_indices=True, batched=True, batch_size=_BATCH, remove_columns=columns)
        return streamed.remove_columns("truncated").filter(lambda row: masking.count_trained(row["labels"]) > 0), None
    tokenized = dataset.map(
        tokenize,
        with_indices=True,
        batched=True,
        batch_size=_BATCH,
        num_proc=options.num_proc if options.num_proc and options.num_proc > 1 else None,
        remove_columns=dataset.column_names,
        desc="Tokenizing",
    )
    return _finish(tokenized, dataset, tokenizer, options)


def as_dataset(rows: Rows) -> Dataset | IterableDataset:
    """``rows`` as a data set, or raise :class:`DataError` if it is none and no list of mappings."""
    if isinstance(rows, Dataset | IterableDataset):
        return rows
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        rows = list(rows)
        bad = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
        if bad is None:
            return Dataset.from_list([dict(row) for row in rows])
        raise DataError(f"row {bad} must be a mapping from column to value", got=rows[bad])
    raise DataError("a data set must be a datasets.Dataset or a list of mappings", got=type(rows).__name__)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, layout: formats.Layout, options: PrepareOptions) -> None:
    if layout == "conversation":
        render.require_template(tokenizer)
    if options.responses is None:
        return
    if layout == "tokens":
        raise DataError(
            "training on responses only needs text or conversations, but the rows are token ids already",
            do=f"Give them a 'labels' column with {IGNORED} for tokens not to train.",
        )
    if not tokenizer.is_fast:
        raise TokenizerError("training on responses only needs a fast tokenizer", got=type(tokenizer).__name__)


class _Tokenize:
    """The function that ``Dataset.map`` applies to a batch of rows; picklable, for worker processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: formats.Layout, options: PrepareOptions) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.options = options

    def __call__(self, columns: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(numbers))]
        if self.layout == "tokens":
            encoded = [_given_tokens(row, number) for row, number in zip(rows, numbers, strict=True)]
        else:
            encoded = self._encode(self._texts(rows, numbers))
        limit = self.options.max_length
        cut = [(ids[:limit], labels[:limit]) for ids, labels in encoded]
        result: dict[str, list[Any]] = {
            "input_ids": [ids for ids, _ in cut],
            "labels": [labels for _, labels in cut],
            "truncated": [limit is not None and len(ids) > limit for ids, _ in encoded],
        }
        if self.options.padding_free:
            result["seq_lengths"] = [[len(ids)] for ids, _ in cut]
        return result

    def _texts(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[str]:
        if self.options.formatting:
            texts = render.formatted(self.options.formatting, rows, numbers[0])
        elif self.layout == "text":
            texts = [formats.text_of(row, self.options.text_field, n) for row, n in zip(rows, numbers, strict=True)]
        else:
            return [
                render.conversation(self.tokenizer, formats.conversation_of(row, n), n)
                for row, n in zip(rows, numbers, strict=True)
            ]
        eos = self.tokenizer.eos_token
        if self.options.append_eos and eos:
            texts = [text if text.endswith(eos) else text + eos for text in texts]
        return texts

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        markers = self.options.responses
        encoded = []
        for text in texts:
            # A template writes the begin-of-text token itself; the tokenizer must not add a second one.
            bos = self.tokenizer.bos_token
            special = self.layout == "text" and not (bos and text.startswith(bos))
            tokens = self.tokenizer(
                text, add_special_tokens=special, return_offsets_mapping=markers is not None, verbose=False
            )
            ids = tokens["input_ids"]
            labels = list(ids)
            if markers is not None:
                spans = masking.response_spans(text, markers)
                labels = masking.label_spans(ids, tokens["offset_mapping"], spans)
            encoded.append((ids, labels))
        return encoded


def _given_tokens(row: Mapping[str, Any], number: int) -> tuple[list[int], list[int]]:
    ids = list(row["input_ids"])
    labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
    if len(labels) != len(ids):
        raise DataError(f"row {number}: {len(ids)} input_ids but {len(labels)} labels")
    if row.get("labels") is None and row.get("attention_mask") is not None:
        labels = [label if seen else IGNORED for label, seen in zip(labels, row["attention_mask"], strict=True)]
    return ids, labels


def _finish(
    tokenized: Dataset, original: Dataset, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions
) -> tuple[Dataset, PrepareReport]:
    """Drop rows without a trained token, count, and pack."""
    trained = [masking.count_trained(labels) for labels in tokenized["labels"][:]]
    kept = [i for i, count in enumerate(trained) if count]
    if not kept:
        raise _nothing_to_train(original, tokenizer, options)
    truncated = sum(tokenized["truncated"])
    dropped = len(tokenized) - len(kept)
    tokenized = tokenized.remove_columns("truncated")
    if dropped:
        tokenized = tokenized.select(kept)
    lengths = [len(ids) for ids in tokenized["input_ids"][:]]
    if options.packing and options.max_length is not None:
        tokenized = _pack(tokenized, lengths, options.max_length)
    report = PrepareReport(
        rows=len(trained),
        dropped=dropped,
        truncated=truncated,
        tokens=sum(lengths),
        trained_tokens=sum(trained),
        batches_rows=len(tokenized),
    )
    return tokenized, report


def _pack(tokenized: Dataset, lengths: list[int], capacity: int) -> Dataset:
    ids, labels = tokenized["input_ids"][:], tokenized["labels"][:]

    def join(column: list[list[int]], row: list[int]) -> list[int]:
        return [token for document in row for token in column[document]]

    rows = packing.pack(lengths, capacity)
    return Dataset.from_dict(
        {
            "input_ids": [join(ids, row) for row in rows],
            "labels": [join(labels, row) for row in rows],
            "seq_lengths": [[lengths[document] for document in row] for row in rows],
        }
    )


def _nothing_to_train(original: Dataset, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions) -> DataError:
    """Explain with the first row why no token is trained."""
    plain = replace(options, responses=None, max_length=None)
    layout = "text" if options.formatting else formats.detect(original.column_names, options.text_field)
    batch = {key: list(islice(values, 1)) for key, values in original[:1].items()}
    rendered = tokenizer.decode(_Tokenize(tokenizer, layout, plain)(batch, [0])["input_ids"][0])
    if options.responses is None:
        return DataError(f"no row has a token to train; the first row is:\n{rendered}\n", do="Check the labels.")
    return DataError(
        f"no row has a token to train: {options.responses.response!r} was not found, or nothing followed it within "
        f"{options.max_length} tokens; the first row is:\n{rendered}\n",
        do="Check instruction_part and response_part against it, or raise the maximum length.",
    )
