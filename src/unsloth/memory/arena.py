"""One piece of host memory that a GPU can read and write while it computes, cut into slices.

Memory is reserved in the sizes that are asked for, and freed with the arena.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth.memory.pinned import PinnedMemory, host_memory

_ALIGNMENT = 4096


@dataclass(frozen=True, eq=False)
class Slice:
    """A part of an arena.

    Attributes:
        memory: (bytes,) uint8 on the host.
        block: Which of the arena's blocks it is of.
        start: Its first byte there.
        size: Its bytes, rounded up.
    """

    memory: torch.Tensor
    block: int
    start: int
    size: int


class Arena:
    """Host memory in slices, up to a limit.

    Args:
        limit: Bytes, of all blocks together.
        pin: Whether to pin it; without a GPU it cannot be.
    """

    def __init__(self, limit: int, *, pin: bool) -> None:
        self.limit, self.pin = limit, pin
        self._blocks: list[torch.Tensor] = []
        self._pinned: list[PinnedMemory] = []
        self._free: list[list[tuple[int, int]]] = []

    @property
    def reserved(self) -> int:
        """Bytes of its blocks."""
        return sum(block.numel() for block in self._blocks)

    @property
    def used(self) -> int:
        """Bytes of the slices that are out."""
        return self.reserved - sum(stop - start for spans in self._free for start, stop in spans)

    def reserve(self, size: int) -> bool:
        """Add a block of ``size`` bytes; False if the limit does not allow it."""
        size = aligned(size)
        if size + self.reserved > self.limit:
            return False
        memory = host_memory(size) if self.pin else torch.empty(size, dtype=torch.uint8)
        if self.pin:
            self._pinned.append(PinnedMemory(memory))
        self._blocks.append(memory)
        self._free.append([(0, size)])
        return True

    def take(self, size: int) -> Slice | None:
        """A slice of ``size`` bytes, from a new block if none has room; None if the limit does not allow it."""
        rounded = aligned(size)
        for number, spans in enumerate(self._free):
            for i, (start, stop) in enumerate(spans):
                if stop - start >= rounded:
                    spans[i : i + 1] = [(start + rounded, stop)] if stop - start > rounded else []
                    return Slice(self._blocks[number][start : start + size], number, start, rounded)
        return self.take(size) if self.reserve(rounded) else None

    def give_back(self, piece: Slice) -> None:
        """Make a slice free again."""
        spans = sorted([*self._free[piece.block], (piece.start, piece.start + piece.size)])
        merged = spans[:1]
        for start, stop in spans[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free[piece.block] = merged


def aligned(size: int) -> int:
    """Bytes that a slice of ``size`` takes."""
    return -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
