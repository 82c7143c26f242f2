"""One pass over all rows: each is encoded once; the tokens go to a table in memory or, if they are many, on disk."""

from __future__ import annotations

import multiprocessing
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm

from unsloth.core.errors import DataError, UnslothError
from unsloth.data import render
from unsloth.data.encode import Encoder, RowEncoder, Work, rows_of
from unsloth.data.sources import Rows

BATCH = 512  # rows tokenized at a time, if they are short
_BATCH_CHARACTERS = 4_000_000
_STREAMED_BATCH = 16  # of a stream, where an error loses the batch that is being read
_AHEAD = 1  # batches being tokenized while the next is rendered
_IN_MEMORY = 1 << 28  # bytes of tokens above which a table is written to the disk

Columns = dict[str, list[Any]]


def encoded_stream(rows: IterableDataset, encoder: RowEncoder, columns: list[str]) -> IterableDataset:
    """What ``encoder`` makes of a streamed data set with these columns, as it is read."""
    source = IterableDataset.from_generator(render.guarded, gen_kwargs={"rows": rows})
    return source.map(encoder, with_indices=True, batched=True, batch_size=_STREAMED_BATCH, remove_columns=columns)


def encoded(rows: Rows, encoder: RowEncoder, in_memory: int = _IN_MEMORY) -> Dataset:
    """What ``encoder`` makes of the rows of a data set or a list; rows of a list need no common schema.

    Args:
        rows: The rows, of known number.
        encoder: Makes token ids of them.
        in_memory: Bytes above which the result is kept on the disk, in a file that goes when it is not used any more.

    Raises:
        DataError: A row that cannot be used, with its number; or a worker process died.
    """
    source = Batches(rows)
    workers = min(encoder.num_proc or 1, len(source))
    if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        tables = _in_processes(source, encoder, workers)
    elif isinstance(encoder, Encoder):
        tables = (_table(columns) for columns in _pipelined(source, encoder))
    else:
        tables = (_table(encoder.encode(*batch)) for batch in source)
    with _Store(in_memory) as store, tqdm(total=len(rows), unit=" rows", desc="Tokenizing") as bar:  # type: ignore[arg-type]
        for table in tables:
            store.add(table)
            bar.update(min(source.size, len(rows) - bar.n))  # type: ignore[arg-type]
        return store.dataset()


def of_table(table: pa.Table) -> Dataset:
    """A table as a data set. Left to itself, ``datasets`` would pickle the whole table to make up a name for it."""
    return Dataset(table, fingerprint=uuid.uuid4().hex[:16])


class Batches(Sequence[tuple[Sequence[Mapping[str, Any]], range]]):
    """Rows a few at a time, with their numbers: as many as are a few megabytes of text, going by a sample.

    Args:
        rows: The rows, of known number.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        sample = [rows[number] for number in range(0, len(rows), max(1, len(rows) // 32))]
        mean = sum(map(_characters, sample)) / max(1, len(sample))
        self.size = max(1, min(BATCH, int(_BATCH_CHARACTERS / max(mean, 1))))

    def __len__(self) -> int:
        return -(-len(self._rows) // self.size)

    def __getitem__(self, which: Any) -> Any:
        if not 0 <= which < len(self):
            raise IndexError(which)
        numbers = range(which * self.size, min((which + 1) * self.size, len(self._rows)))
        rows = self._rows[numbers.start : numbers.stop]
        return rows_of(rows, len(numbers)) if isinstance(self._rows, Dataset) else rows, numbers


def _characters(value: Any) -> int:
    """About how much text is in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_characters, value)) if not value or not isinstance(value[0], int) else 8 * len(value)
    return 8


def _pipelined(batches: Batches, encoder: Encoder) -> Iterator[Columns]:
    """Encode batches in order; while one is tokenized, on all cores, the next is rendered."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as tokenizing:
        waiting: deque[tuple[Work, Future[None]]] = deque()
        for rows, numbers in batches:
            work = encoder.begin(rows, numbers)
            waiting.append((work, tokenizing.submit(work.tokenize)))
            if len(waiting) > _AHEAD:
                yield _finished(encoder, *waiting.popleft())
        while waiting:
            yield _finished(encoder, *waiting.popleft())


def _finished(encoder: Encoder, work: Work, tokenized: Future[None]) -> Columns:
    tokenized.result()
    return encoder.finish(work)


def _in_processes(batches: Batches, encoder: RowEncoder, workers: int) -> Iterator[pa.Table]:
    """Encode batches in worker processes, in order.

    Workers are forked, so that they share the rows with this process instead of having copies; every one takes each
    ``workers``-th batch, and waits while its results are not fetched.
    """
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        pipes = []
        for first in range(workers):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(sending, batches, encoder, range(first, len(batches), workers)), daemon=True
            )
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            sending.close()
            stack.callback(receiving.close)
            pipes.append(receiving)
        for number in range(len(batches)):
            yield _received(pipes[number % workers], workers)


def _received(pipe: Connection, workers: int) -> pa.Table:
    try:
        result = pipe.recv()
    except EOFError:
        raise DataError(
            "a worker process that tokenized rows died",
            do=f"Often memory ran out: lower dataset_num_proc (now {workers}).",
        ) from None
    if isinstance(result, Exception):
        raise result
    return pa.ipc.open_stream(result).read_all()


def _work(pipe: Connection, batches: Batches, encoder: RowEncoder, which: range) -> None:
    """What a worker process does; an error of a row is passed on and ends it."""
    for number in which:
        try:
            table = _table(encoder.encode(*batches[number]))
        except (UnslothError, ValueError, TypeError, LookupError, OSError) as error:
            pipe.send(error)
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        pipe.send(sink.getvalue().to_pybytes())


def _table(columns: Columns) -> pa.Table:
    return pa.table({name: _arrow(column) for name, column in columns.items()})


def _arrow(column: list[Any]) -> pa.Array:
    if not column or not isinstance(column[0], list):
        return pa.array(column)
    ends = np.fromiter(accumulate(map(len, column), initial=0), np.int32, len(column) + 1)
    values = np.fromiter(chain.from_iterable(column), np.int32, int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


class _Store:
    """Collects tables of one schema."""

    def __init__(self, in_memory: int) -> None:
        self._limit = in_memory
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._writer: Any = None

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._folder is not None:
            self._folder.cleanup()  # who has the file mapped keeps it

    def add(self, table: pa.Table) -> None:
        self._bytes += table.nbytes
        if self._writer is not None:
            self._writer.write_table(table)
            return
        self._tables.append(table)
        if self._bytes > self._limit:
            self._folder = tempfile.TemporaryDirectory(prefix="unsloth-tokens-")
            self._writer = pa.ipc.new_stream(str(self._file()), table.schema)
            for earlier in self._tables:
                self._writer.write_table(earlier)
            self._tables = []

    def dataset(self) -> Dataset:
        if self._writer is None:
            return of_table(pa.concat_tables(self._tables))
        self._writer.close()
        self._writer = None
        return of_table(pa.ipc.open_stream(pa.memory_map(str(self._file()))).read_all())

    def _file(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "tokens.arrow"
