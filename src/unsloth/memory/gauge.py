"""How much of a GPU the layers may take, when nobody gave a number: what the rest of a step was seen to leave.

Logits, gradients, optimizer states and whatever else a step needs are not known before it was taken. So the first pass
keeps little, and the peak that it left says what the others took::

    others = peak of all - what the layers held by their own rules        room = all memory - others - a reserve
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_RESERVE = 2**30
_RESERVED_SHARE = 0.04


@dataclass(frozen=True)
class Reading:
    """Of a device's memory, in bytes.

    Attributes:
        total: What this process has, used or not, and could have.
        allocated: In tensors now.
        peak: The most that was ever.
    """

    total: int
    allocated: int
    peak: int


@dataclass(frozen=True)
class Room:
    """What the layers may take.

    Attributes:
        size: Bytes on the device.
        known: Whether the rest of such a step was seen.
    """

    size: int
    known: bool


def read(device: torch.device) -> Reading:
    """The memory of a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    total = free + torch.cuda.memory_reserved(device)
    return Reading(total, torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))


class Gauge:
    """Learns from pass to pass.

    Args:
        reader: Reads the memory of a device.
    """

    def __init__(self, reader: Callable[[torch.device], Reading] = read) -> None:
        self._reader = reader
        self._others = 0
        self._largest = 0

    def free(self, device: torch.device) -> int:
        """Bytes that no tensor takes."""
        now = self._reader(device)
        return now.total - now.allocated

    def allocated(self, device: torch.device) -> int:
        """Bytes that tensors take."""
        return self._reader(device).allocated

    def learn(self, device: torch.device, batch: int, held: int) -> None:
        """A pass of a batch of size ``batch`` (in whatever unit) is over, in which the layers held ``held`` bytes."""
        self._others = max(self._others, self._reader(device).peak - held)
        self._largest = max(self._largest, batch)

    def room(self, device: torch.device, batch: int, later: int, held: int) -> Room:
        """For a pass of size ``batch``.

        Args:
            device: Where.
            batch: In the unit of :meth:`learn`.
            later: Bytes that the first steps will take and an early pass has not shown.
            held: Bytes of the layers that are allocated already.
        """
        now = self._reader(device)
        known = 0 < batch <= self._largest
        others = max(self._others, now.allocated - held) if known else now.allocated - held
        reserve = max(_RESERVE, int(_RESERVED_SHARE * now.total))
        return Room(max(0, now.total - others - later - reserve), known)
