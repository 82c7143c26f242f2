"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, IterableDataset

from unsloth.core import artifact
from unsloth.core.errors import DataError
from unsloth.data import json_rows, tables
from unsloth.data.json_rows import LazyRows

Rows: TypeAlias = "Dataset | IterableDataset | Sequence[Mapping[str, Any]]"

_NOT_DATA = ("readme.md", "license.txt", "license.md", artifact.MANIFEST)

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".txt", ".md")


class Joined(LazyRows):
    """The rows of several sources, one after another."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> Mapping[str, Any]:
        """Row ``number`` of all."""
        part = next(i for i, start in enumerate(self._starts[1:]) if number < start)
        return self._parts[part][number - self._starts[part]]


def load_rows(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    kind: str | None = None,
    name: str | None = None,
    sheet: str | None = None,
    delimiter: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    streaming: bool = False,
) -> Rows:
    """The rows of a file, of all files of a folder, or of a data set on the hub.

    Files may be JSON Lines, JSON, CSV, TSV, Excel (.xlsx), Parquet, or text (a row a file); all but Excel and Parquet
    also compressed (.gz). A JSON Lines file is not held in memory.

    Args:
        source: A path, or a hub id.
        split: Split of a hub data set, or of a folder that ``datasets`` saved with several.
        kind: Format of a file whose name does not tell: a suffix without its dot, such as ``"csv"``.
        name: Configuration of a hub data set.
        sheet: Sheet of an Excel file.
        delimiter: Of a CSV file; found out if not given.
        revision: Revision of a hub data set.
        token: Hub token.
        streaming: Read a hub data set as it goes.

    Returns:
        The rows; they need not have the same columns.

    Raises:
        DataError: There is no such source, or it cannot be read; names the file and the line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split, sheet, delimiter)
    if path.is_file():
        return _file(path, sheet, delimiter, kind)
    text = os.fspath(source)
    if path.suffix.lower() in (*SUFFIXES, ".gz", ".xls") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise DataError(
            "there is no such file", got=text, do=f"Check the path; the current folder is {Path.cwd().name}/."
        )
    return _hub(text, split, name, revision, token, streaming)


def _file(path: Path, sheet: str | None, delimiter: str | None, given: str | None = None) -> Rows:
    if path.stat().st_size == 0:
        raise DataError("the file is empty", got=path, do="Check how it was written.")
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    kind = f".{given}" if given else kind
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": json_rows.read_jsonl,
        ".ndjson": json_rows.read_jsonl,
        ".json": json_rows.read_json,
        ".csv": lambda path: tables.read_csv(path, delimiter),
        ".tsv": lambda path: tables.read_csv(path, delimiter),
        ".xlsx": lambda path: tables.read_excel(path, sheet),
        ".parquet": tables.read_parquet,
        ".txt": _text,
        ".md": _text,
    }
    if kind not in readers:
        raise DataError(
            "files of this kind cannot be read", got=path, do=f"Readable are {', '.join(SUFFIXES)}, also with .gz."
        )
    return readers[kind](path)


def _text(path: Path) -> list[dict[str, str]]:
    try:
        return [{"text": path.read_text(encoding="utf-8-sig"), "source": path.name}]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the bytes are not UTF-8 at byte {error.start}", do="Save the file as UTF-8."
        ) from None


def _folder(path: Path, split: str, sheet: str | None, delimiter: str | None) -> Rows:
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise DataError("the folder has no such split", got=split, do=f"It has {', '.join(splits)}.")
        return splits[split]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _readable(file)]
    if not files:
        raise DataError("the folder has no file that can be read", got=path, do=f"Readable are {', '.join(SUFFIXES)}.")
    parts = [_file(file, sheet, delimiter) for file in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _readable(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    plain = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    hidden = path.name.startswith(".") or path.name.lower() in _NOT_DATA
    return bool(plain) and plain[-1] in SUFFIXES and not hidden


def _hub(
    repository: str, split: str, name: str | None, revision: str | None, token: Any, streaming: bool
) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(repository, name, split=split, revision=revision, token=token, streaming=streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set could not be loaded from the hub: {str(error).splitlines()[0]}",
            got=repository,
            do="Check the name, the split and the network; a file is named by its path.",
        ) from error
