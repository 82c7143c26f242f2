"""Rows of JSON files; of a JSON Lines file one row at a time, so that it may be larger than the memory."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unsloth.core.errors import DataError

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LISTS = ("data", "rows", "train", "examples", "conversations")


class LazyRows(Sequence[Mapping[str, Any]]):
    """Rows that are made when they are asked for."""

    def row(self, number: int) -> Mapping[str, Any]:
        """Row ``number``, counted from 0."""
        raise NotImplementedError

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self.row(number) for number in range(*which.indices(len(self)))]
        number = which + len(self) if which < 0 else which
        if not 0 <= number < len(self):
            raise IndexError(which)
        return self.row(number)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self.row(number) for number in range(len(self)))


class JsonLines(LazyRows):
    """The rows of a JSON Lines file, read from the disk one by one; only where each begins is kept.

    Args:
        path: The file.

    Raises:
        DataError: No rows; or, when a row is read, a line that is no JSON object, with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ends = [np.zeros(0, np.int64)]
        blank = True
        with path.open("rb") as file:
            for position, chunk in _chunks(file):
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1)
                blank = blank and not chunk.strip(b"\xef\xbb\xbf \t\r\n")
        size = path.stat().st_size
        breaks = np.unique(np.concatenate([*ends, [size]]))
        if blank:
            raise DataError("the file has no rows", got=path, do="Check how it was written.")
        self._starts, self._ends = np.concatenate([[0], breaks[:-1]]), breaks
        lines = np.arange(1, len(breaks) + 1)
        # Blank lines between rows are no rows; they are short, so only short ones are looked at.
        short = np.flatnonzero(self._ends - self._starts <= 8)
        empty = [i for i in short if not self._read(int(i)).strip()]
        keep = np.setdiff1d(np.arange(len(breaks)), empty)
        self._starts, self._ends, self._lines = self._starts[keep], self._ends[keep], lines[keep]

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> Mapping[str, Any]:
        """Row ``number``; reads its line."""
        return parse_line(self._read(number), self.path, int(self._lines[number]))

    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, slice) or which.step not in (None, 1):
            return super().__getitem__(which)
        first, last, _ = which.indices(len(self))
        if first >= last:
            return []
        with self.path.open("rb") as file:
            file.seek(self._starts[first])
            block = file.read(int(self._ends[last - 1] - self._starts[first]))
        base = self._starts[first]
        return [
            parse_line(block[self._starts[i] - base : self._ends[i] - base], self.path, int(self._lines[i]))
            for i in range(first, last)
        ]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(self), 256):
            yield from self[start : start + 256]

    def _read(self, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            return file.read(int(self._ends[number] - self._starts[number]))


def _chunks(file: Any) -> Iterator[tuple[int, bytes]]:
    position = 0
    while chunk := file.read(_CHUNK):
        yield position, chunk
        position += len(chunk)


def parse_line(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    """The row of one line.

    Raises:
        DataError: It is no JSON object, or not UTF-8; names file and line.
    """
    where = f"{path}, line {number}"
    if number == 1:
        line = line.removeprefix(_BOM)
    try:
        row = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair, which is no character",
            got=f"\\u{ord(error.object[error.start]):04x}",
            do="Write the file again with complete characters.",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: the bytes are not UTF-8 at byte {error.start}",
            got=line[error.start : error.start + 4],
            do="Save the file as UTF-8.",
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: no valid JSON at column {error.colno} ({error.msg})",
            got=line[:80].decode("utf-8", "replace").strip(),
            do="Repair or remove the line.",
        ) from None
    return as_row(row, where)


def as_row(row: Any, where: str) -> Mapping[str, Any]:
    """A row as a mapping; a bare list of messages is a conversation."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, list) and row and all(isinstance(message, Mapping) for message in row):
        return {"conversations": row}
    raise DataError(f"{where}: a row must be a mapping from column to value", got=row, do="Repair or remove it.")


def read_jsonl(path: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of a JSON Lines file; a compressed one is read at once."""
    if path.suffix != ".gz":
        return JsonLines(path)
    with gzip.open(path, "rb") as file:
        try:
            rows = [parse_line(line, path, i) for i, line in enumerate(file, start=1) if line.strip()]
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is no complete gzip file: {error}", do="Download or compress it again.") from None
    if not rows:
        raise DataError("the file has no rows", got=path, do="Check how it was written.")
    return rows


def read_json(path: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of a JSON file: a list of objects, an object with such a list, or columns; or JSON Lines after all."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    data = data.removeprefix(_BOM)
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the bytes are not UTF-8 at byte {error.start}", do="Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_jsonl(path)
        raise DataError(
            f"{path}, line {error.lineno}: no valid JSON at column {error.colno} ({error.msg})",
            do="Repair the file; JSON Lines files end in .jsonl.",
        ) from None
    rows = _rows_of(value, path)
    return [as_row(row, f"{path}, row {i}") for i, row in enumerate(rows)]


def _rows_of(value: Any, path: Path) -> list[Any]:
    if isinstance(value, Mapping):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        name = next((name for name in _LISTS if name in lists and len(lists) == 1), None)
        if name is not None and all(isinstance(row, Mapping | list) for row in lists[name]):
            value = lists[name]
        elif lists and len(lists) == len(value) and len({len(column) for column in lists.values()}) == 1:
            value = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        else:
            value = [value]
    if not isinstance(value, list) or not value:
        raise DataError("the file must hold a list of rows", got=path, do="Write it as [{...}, {...}].")
    return value
