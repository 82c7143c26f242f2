"""Packing: several short documents share one row, without seeing each other."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign documents to rows by best-fit decreasing, which fills rows to within a few percent.

    Each document goes, longest first, into the row whose free space it fills best. Deterministic.

    Args:
        lengths: Tokens of each document; none above ``capacity``.
        capacity: Tokens of a row.

    Returns:
        For each row the indices of its documents, in ascending order; rows ordered by their first document.
    """
    rows: list[list[int]] = []
    # Rows by free space: a sorted list of the spaces there are, and for each a heap of row numbers.
    spaces: list[int] = []
    by_space: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, more than a row of {capacity} holds")
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = heapq.heappop(by_space[space])
            if not by_space[space]:
                del by_space[space]
                spaces.pop(place)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = space - length
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        heapq.heappush(by_space[left], row)
    return sorted(sorted(row) for row in rows)
