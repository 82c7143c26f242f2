"""The results files of the benches: a line a case, whose columns are a data class's fields."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append(name: str, rows: Sequence[Any]) -> Path:
    """Add ``rows``, which are data classes, to the file ``name`` of the results; numbers have six digits."""
    path = RESULTS / name
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(asdict(rows[0])))
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(row).items()})
    return path
