"""The results files of the benches: a line a case, under a line with the names of the columns."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append(name: str, rows: Sequence[Any]) -> Path:
    """Add ``rows``, which are data classes, to the file ``name`` of the results; numbers have six digits."""
    lines = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
    return append_lines(RESULTS / name, lines)


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    """Add ``lines``, from column to value, to a file; its columns are those of the first line unless given."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns or list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)
    return path
