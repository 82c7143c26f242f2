"""Host memory that was freed goes back to the system at once, for as long as it matters."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL = 64 * 1024
_LARGEST_DYNAMIC = 32 * 1024 * 1024  # where glibc's own adjustment of the threshold ends


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Make glibc return every freed block of 64 KiB or more to the system while the block runs.

    By default it keeps freed memory for later, up to several times the size of a model that is quantized matrix by
    matrix. Afterwards the threshold is the one that glibc reaches by itself in a process that frees large blocks.
    Has no effect with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_DYNAMIC)
            mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_DYNAMIC)
