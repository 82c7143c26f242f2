"""Rows of tables: CSV, TSV, Excel and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, Image, List

from unsloth.core.errors import ConfigError, DataError
from unsloth.core.log import get_logger

_DELIMITERS = ",;\t|"
_EMPTY = ["", "NaN", "nan", "NULL", "N/A", "#N/A"]
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_CELL = re.compile(r"([A-Z]+)(\d+)")
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LINK = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
_DATE_FORMATS = {*range(14, 23), 45, 47}
_SPAN_FORMAT = 46

logger = get_logger(__name__)


def is_frame(rows: Any) -> bool:
    """Whether ``rows`` are a DataFrame of pandas, which is not imported for that."""
    return type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "columns")


def as_dataset(rows: Any) -> Dataset:
    """Rows as a data set that has the columns of all of them; empty cells of a pandas frame (NaN) are None in it.

    Raises:
        DataError: A column holds values of kinds that one column cannot have; names it.
    """
    if isinstance(rows, Dataset):
        return rows
    if is_frame(rows):
        return Dataset.from_pandas(rows, preserve_index=False)
    listed = [dict(row) for row in rows]
    columns = {name: [row.get(name) for row in listed] for name in dict.fromkeys(chain.from_iterable(listed))}
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"column '{name}' holds values of different kinds ({str(error).splitlines()[0]})",
                do="Give it one kind of value in every row, such as text.",
            ) from error
    return Dataset.from_dict(columns)


def undecoded(rows: Any) -> Any:
    """A data set whose images stay the bytes they are, so that one that cannot be decoded does not end the reading."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def read_csv(path: Path, delimiter: str | None = None) -> Dataset:
    """The rows of a CSV or TSV file, with or without a byte-order mark.

    Empty cells are None; a column of numbers is read as numbers, everything else as text.

    Args:
        path: The file, ``.gz`` too.
        delimiter: What separates cells; None finds out from the first line.

    Raises:
        DataError: No rows, columns of one name, a row with too few or too many cells, or bytes that are not UTF-8;
            names the line.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: the bytes are not UTF-8",
            got=data[error.start : error.start + 8],
            do="Save the file as UTF-8 (in Excel: CSV UTF-8).",
        ) from None
    if not text.strip():
        raise DataError("the file has no rows", got=path, do="Check how it was written.")
    first = text.split("\n", 1)[0]
    delimiter = delimiter or _delimiter(first, path)
    names = next(csv.reader(io.StringIO(text), delimiter=delimiter))
    names = _unique([name.strip() or f"column_{i + 1}" for i, name in enumerate(names)], path)
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False,  # errors name the row only then
                column_names=names,
                skip_rows=1,
                block_size=max(1 << 20, min(len(data) + 1, (1 << 31) - 1)),
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=_EMPTY
            ),
        )
    except pa.ArrowInvalid as error:
        raise _bad_row(path, str(error)) from None
    if not table.num_rows:
        raise DataError("the file has column names but no rows", got=path, do="Check how it was written.")
    return Dataset(pa.table({name: _typed(table.column(name).to_pylist()) for name in names}))


def _delimiter(header: str, path: Path) -> str:
    if ".tsv" in path.suffixes:
        return "\t"
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=lambda mark: (bare.count(mark), -_DELIMITERS.index(mark)))


def _unique(names: list[str], path: Path) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns have one name", got=twice, do="Rename one of them in the first line.")
    return names


def _bad_row(path: Path, message: str) -> DataError:
    found = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", message)
    if found:
        row, expected, got = found.groups()
        return DataError(
            f"{path}, row {int(row) - 1} (line {row} if no cell holds a line break): {got} cells instead of {expected}",
            do="Put cells with the delimiter in them into double quotes.",
        )
    return DataError(f"{path} cannot be read: {message.splitlines()[0]}", do="Repair the file.")


def _typed(values: list[Any]) -> pa.Array:
    """A column of text as whole numbers or numbers, if all that is there are such."""
    given = [value.strip() for value in values if value is not None]
    if given and all(_WHOLE.fullmatch(value) for value in given):
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    if given and all(_NUMBER.fullmatch(value) for value in given):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array(values, pa.string())


def read_parquet(path: Path) -> Dataset:
    """The rows of a Parquet file.

    Raises:
        DataError: It is no Parquet file, or has no rows.
    """
    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is no complete Parquet file: {str(error).splitlines()[0]}", do="Download or write it again."
        ) from None
    if not table.num_rows:
        raise DataError("the file has no rows", got=path, do="Check how it was written.")
    return Dataset(table)


def read_excel(path: Path, sheet: str | None = None) -> list[dict[str, Any]]:
    """The rows of a sheet of an Excel file (.xlsx); the first row has the column names.

    The value of merged cells stands in each of them, which is said in the log, and so is how many cells hold an error
    or a formula without its result, and are empty. Empty rows are left out. Dates and times are text as in ISO 8601,
    spans of time are hours, minutes and seconds.

    Args:
        path: The file.
        sheet: Name of the sheet; None is the first.

    Raises:
        ConfigError: There is no such sheet.
        DataError: It is no such file, or has no rows, or columns of one name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            cells, merged, lost = _sheet(archive, sheet)
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise DataError(
            f"{path} is no Excel file of the present format: {error}", do="Save it as .xlsx or as CSV UTF-8."
        ) from None
    for first, last in merged:
        for row in range(first[0], last[0] + 1):
            for column in range(first[1], last[1] + 1):
                cells.setdefault((row, column), cells.get(first))
    if merged:
        logger.info("%s: merged cells in %d places; each of their cells has the value now", path, len(merged))
    if lost:
        logger.warning(
            "%s: %d cells are empty because they hold an error, or a formula whose result was not saved, such as %s. "
            "Open the file in a spreadsheet program and save it, or fill them in",
            path,
            len(lost),
            lost[0],
        )
    return _rows(cells, path)


def _rows(cells: Mapping[tuple[int, int], Any], path: Path) -> list[dict[str, Any]]:
    numbers = sorted({row for row, _ in cells})
    if len(numbers) < 2:
        raise DataError("the sheet has no rows below its column names", got=path, do="Name another with sheet=...")
    head = {column: value for (row, column), value in cells.items() if row == numbers[0] and value is not None}
    columns = sorted(head)
    names = _unique([str(head[column]).strip() for column in columns], path)
    rows = []
    for number in numbers[1:]:
        values = [cells.get((number, column)) for column in columns]
        if any(value is not None for value in values):
            rows.append(dict(zip(names, values, strict=True)))
    return rows


def _sheet(archive: zipfile.ZipFile, name: str | None) -> tuple[dict[tuple[int, int], Any], list[Any], list[str]]:
    """Cells by row and column, both from 0; the corners of merged ranges; and which cells lost their value."""
    book = _xml(archive, "xl/workbook.xml")
    sheets = {sheet.get("name"): sheet.get(_LINK) for sheet in book.iter(f"{_MAIN}sheet")}
    if name is not None and name not in sheets:
        raise ConfigError("there is no such sheet", got=name, do=f"The sheets are {', '.join(map(str, sheets))}.")
    link = sheets[name] if name is not None else next(iter(sheets.values()))
    targets = {relation.get("Id"): relation.get("Target") for relation in _xml(archive, "xl/_rels/workbook.xml.rels")}
    target = str(targets[link]).lstrip("/")
    sheet = _xml(archive, target if target.startswith("xl/") else f"xl/{target}")
    shared: list[str] = []
    if "xl/sharedStrings.xml" in archive.namelist():
        shared = [_text(item) for item in _xml(archive, "xl/sharedStrings.xml").iter(f"{_MAIN}si")]
    settings = book.find(f"{_MAIN}workbookPr")
    is_1904 = settings is not None and settings.get("date1904", "0") in ("1", "true")
    times = _Times(_time_styles(archive), datetime(1904, 1, 1) if is_1904 else datetime(1899, 12, 30))
    cells, lost = {}, []
    for cell in sheet.iter(f"{_MAIN}c"):
        value = _value(cell, shared, times)
        if value is not None:
            cells[_place(cell.get("r", ""))] = value
        elif cell.get("t") == "e" or cell.find(f"{_MAIN}f") is not None:
            lost.append(cell.get("r", ""))
    merged = [
        tuple(_place(corner) for corner in (area.get("ref", "").split(":") * 2)[:2])
        for area in sheet.iter(f"{_MAIN}mergeCell")
    ]
    return cells, merged, lost


def _xml(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    data = archive.read(name)
    if b"<!DOCTYPE" in data[:1000]:
        raise DataError("an Excel file must not declare entities", got=name, do="Do not use this file.")
    return ElementTree.fromstring(data)


def _text(item: ElementTree.Element) -> str:
    """The text of a string, which may be in several runs; phonetic guides are left out."""
    runs = [run for run in item if run.tag != f"{_MAIN}rPh"]
    return "".join(part.text or "" for run in runs for part in run.iter(f"{_MAIN}t"))


@dataclass(frozen=True)
class _Times:
    """How a workbook writes times: as days since its beginning, in cells of certain styles."""

    styles: Mapping[int, str]
    beginning: datetime

    def text(self, days: float, style: int) -> str:
        seconds = round(days * 86400)
        if self.styles[style] == "span":
            return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        moment = self.beginning + timedelta(seconds=seconds)
        if 0 <= days < 1:
            return moment.time().isoformat(timespec="seconds")
        return moment.date().isoformat() if seconds % 86400 == 0 else moment.isoformat(sep=" ", timespec="seconds")


def _value(cell: ElementTree.Element, shared: Sequence[str], times: _Times) -> Any:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return _text(cell) or None
    found = cell.find(f"{_MAIN}v")
    if found is None or not found.text:
        return None
    if kind == "s":
        return shared[int(found.text)] or None
    if kind == "n":
        number = float(found.text)
        style = int(cell.get("s", 0))
        if style in times.styles:
            return times.text(number, style)
        return int(number) if number.is_integer() else number
    if kind == "b":
        return found.text == "1"
    return None if kind == "e" else found.text


def _time_styles(archive: zipfile.ZipFile) -> dict[int, str]:
    """The cell styles that show a number as a ``"date"`` (or time of day), or as a ``"span"`` of time."""
    if "xl/styles.xml" not in archive.namelist():
        return {}
    styles = _xml(archive, "xl/styles.xml")
    kinds = {**dict.fromkeys(_DATE_FORMATS, "date"), _SPAN_FORMAT: "span"}
    for entry in styles.iter(f"{_MAIN}numFmt"):
        code = re.sub(r'"[^"]*"|\\.', "", entry.get("formatCode", "").lower())
        if re.search(r"\[(h+|m+|s+)\]", code):
            kinds[int(entry.get("numFmtId", 0))] = "span"
        elif re.search(r"[ymdhs]", re.sub(r"\[[^\]]*\]", "", code)):
            kinds[int(entry.get("numFmtId", 0))] = "date"
    formats = styles.find(f"{_MAIN}cellXfs")
    ids = [int(entry.get("numFmtId", 0)) for entry in formats] if formats is not None else []
    return {i: kinds[number] for i, number in enumerate(ids) if number in kinds}


def _place(reference: str) -> tuple[int, int]:
    found = _CELL.fullmatch(reference)
    if found is None:
        raise DataError("a cell of the sheet has no place", got=reference)
    column = 0
    for letter in found[1]:
        column = column * 26 + ord(letter) - ord("A") + 1
    return int(found[2]) - 1, column - 1
