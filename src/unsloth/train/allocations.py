"""Counting the memory of tensors, operation by operation, on real tensors or on shapes alone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Label = Callable[[torch.Tensor], str]


class Allocations(TorchDispatchMode):
    """Records when the storage of every tensor that an operation returns begins and ceases to exist.

    Storages that were there before the block are not counted, nor is what a kernel allocates inside itself.

    Args:
        label: Names the kind of a tensor by its shape; called once for each new storage.
    """

    def __init__(self, label: Label) -> None:
        super().__init__()
        self._label = label
        self._kinds: list[str] = []
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes added or removed)
        self._live: dict[int, int] = {}  # address of the storage: its number
        self._known: set[int] = set()

    def exclude(self, tensors: list[torch.Tensor]) -> None:
        """Do not count the storages of these tensors, which existed before."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def relabel(self, tensor: torch.Tensor, kind: str) -> None:
        """Say what a tensor that still exists turned out to be."""
        number = self._live.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._kinds[number] = kind

    def peak(self) -> Counter[str]:
        """Bytes by kind at the moment when most were allocated."""
        now = most = end = 0
        for position, (_, change) in enumerate(self._events):
            now += change
            if now > most:
                most, end = now, position + 1
        at_peak: Counter[str] = Counter()
        for number, change in self._events[:end]:
            at_peak[self._kinds[number]] += change
        return at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live or address in self._known:
            return
        number, size = len(self._kinds), storage.nbytes()
        self._kinds.append(self._label(tensor))
        self._live[address] = number
        self._events.append((number, size))
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._events.append((self._live.pop(address), -size))
