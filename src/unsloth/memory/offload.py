"""Tensors that wait in host memory between forward and backward, moved while the device computes.

Copies run on a stream of their own. Out: a tensor stays referenced until the copy of the second next one begins, so
that two are on their way at a time, and its memory is used again in a known order. Back: asking for one parcel starts
the copy of the one that was sent before it, which is the next that a backward pass asks for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from unsloth.memory.arena import Arena, Slice

_ON_THE_WAY = 2


class Offloader:
    """Sends tensors of one device to an arena and gets them back.

    Args:
        arena: Where to.
        device: Whose tensors.
    """

    def __init__(self, arena: Arena, device: torch.device) -> None:
        self.arena, self.device = arena, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Any, tuple[torch.Tensor, ...]]] = deque()
        self._last: weakref.ref[Parcel] | None = None

    def send(self, tensors: Sequence[torch.Tensor]) -> Parcel | None:
        """Start moving contiguous ``tensors`` out; None if the arena has no room. The caller may drop them."""
        pieces: list[Slice] = []
        for tensor in tensors:
            piece = self.arena.take(tensor.nbytes)
            if piece is None:
                for taken in pieces:
                    self.arena.give_back(taken)
                return None
            pieces.append(piece)
        while len(self._leaving) >= _ON_THE_WAY:
            self.progress()
        with self._beside():
            for tensor, piece in zip(tensors, pieces, strict=True):
                _as(piece, tensor).copy_(tensor, non_blocking=True)
        self._leaving.append((self._mark(), tuple(tensors)))
        parcel = Parcel(self, pieces, tensors, self._last() if self._last is not None else None)
        self._last = weakref.ref(parcel)
        return parcel

    def progress(self) -> None:
        """Let go of the tensors that have been on their way for longest."""
        if self._leaving:
            self._wait(self._leaving.popleft()[0])

    def settle(self) -> None:
        """Let go of tensors whose copies have been started."""
        while self._leaving:
            self.progress()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of copies, after all that the device has been told so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _mark(self) -> Any:
        return None if self.stream is None else self.stream.record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Parcel:
    """Tensors that were sent; their slices go back to the arena with it.

    Attributes:
        before: The parcel that was sent before, as long as it waits.
    """

    def __init__(
        self, owner: Offloader, pieces: list[Slice], tensors: Sequence[torch.Tensor], before: Parcel | None
    ) -> None:
        self.owner, self.pieces = owner, pieces
        self.forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self.before = None if before is None else weakref.ref(before)
        self._coming: tuple[Any, list[torch.Tensor]] | None = None
        weakref.finalize(self, _release, owner.arena, pieces)

    def start(self) -> None:
        """Start moving the tensors back, once."""
        if self._coming is not None:
            return
        owner = self.owner
        # memory of the current stream: what is done with it there is in order, before the copy and after the wait
        arrived = [torch.empty(shape, dtype=dtype, device=owner.device) for shape, dtype in self.forms]
        with owner._beside():
            for tensor, piece in zip(arrived, self.pieces, strict=True):
                tensor.copy_(_as(piece, tensor), non_blocking=True)
        self._coming = owner._mark(), arrived

    def fetch(self) -> list[torch.Tensor]:
        """The tensors, back on the device; starts on the parcel that is needed next."""
        self.owner.settle()
        self.start()
        before = None if self.before is None else self.before()
        if before is not None:
            before.start()
        assert self._coming is not None
        event, tensors = self._coming
        self._coming = None
        self.owner._wait(event)
        return tensors


def _as(piece: Slice, like: torch.Tensor) -> torch.Tensor:
    return piece.memory.view(like.dtype).view(like.shape)


def _release(arena: Arena, pieces: list[Slice]) -> None:
    for piece in pieces:
        arena.give_back(piece)
