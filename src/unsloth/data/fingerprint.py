"""Telling data sets apart by their rows and the order of these."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

_BATCH = 1000


@dataclass(frozen=True)
class Fingerprint:
    """What distinguishes a data set.

    Attributes:
        rows: How many rows; None if unknown (streamed).
        sha256: Of all rows in their order; None where they cannot be read over without side effects (streams, and
            data sets that compute their rows).
    """

    rows: int | None
    sha256: str | None

    def __str__(self) -> str:
        rows = "a stream" if self.rows is None else f"{self.rows:,} rows"
        return f"{rows} ({self.sha256[:12]})" if self.sha256 else rows


def of(dataset: Any) -> Fingerprint:
    """The fingerprint of a data set; reads it once, at about the speed of the disk or of SHA-256."""
    if not isinstance(dataset, Dataset):
        return Fingerprint(len(dataset) if isinstance(dataset, Sized) else None, None)
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(_BATCH):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return Fingerprint(len(dataset), digest.hexdigest())
