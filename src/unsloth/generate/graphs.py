"""CUDA graphs of decoding steps, captured when they are first worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

_LEAST_FREE = 1 << 30  # bytes


class Graphs:
    """Graphs by key; all in one pool of memory, since only one runs at a time.

    A function's first call with a key runs it as it is, which compiles kernels and chooses algorithms; the second
    captures it. What the function returned then is returned by every later call, with new contents.

    Attributes:
        seconds: Spent capturing so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """The function's result, by its graph from the second call on."""
        if key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def clear(self) -> None:
        """Forget all graphs: something that they read has moved."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Neither waits for the device nor gives cached memory back (as ``torch.cuda.graph`` does) without need."""
        start = time.perf_counter()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if torch.cuda.mem_get_info(self._device)[0] < _LEAST_FREE:  # an allocator that captures cannot free any itself
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        self.seconds += time.perf_counter() - start
        return graph, result
