"""Computations that do not depend on each other, at once.

A small product leaves most of a GPU idle. While a CUDA graph is captured, such computations become branches of it,
which the device runs together; elsewhere they run one after the other, since waiting for other streams costs the host
more than it gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch


def side_by_side(functions: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """Results of functions of which none reads what another writes.

    What they allocate may be used afterwards as usual: a branch begins after all that was launched before it, so
    memory that it takes anew is not in use any more.

    Args:
        functions: Each launches work on the current stream. The first gets ahead of the others where they compete, so
            it should be short: large products occupy all multiprocessors until they are done.
        device: Where.
    """
    if len(functions) < 2 or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [function() for function in functions]
    main = torch.cuda.current_stream(device)
    begin = main.record_event()
    results, ends = [], []
    for function, stream in zip(functions[:-1], _streams(device, len(functions) - 1), strict=True):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            results.append(function())
            ends.append(stream.record_event())
    results.append(functions[-1]())
    for end in ends:
        main.wait_event(end)
    return results


@cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """The first has a high priority, which the nodes of a captured graph keep."""
    return tuple(torch.cuda.Stream(device, priority=0 if i else -1) for i in range(count))
