"""How allocators of the host and of GPUs are set, where their defaults waste memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of torch, today's name and the earlier one."""

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


def grow_segments() -> bool:
    """Have torch's CUDA allocator grow its segments instead of adding others, unless the user has set it.

    Activations of changing sizes otherwise leave holes that nothing else fits into: up to a third of what is reserved.
    It is the setting ``expandable_segments`` of torch's documentation: its environment variable, which is read when a
    process first uses a GPU, and where one is in use already (importing bitsandbytes is enough), torch's own setter.

    Returns:
        Whether it was set; False where the user has set something, or this torch cannot change it any more.
    """
    if any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return False
    setting = "expandable_segments:True"
    if torch.cuda.is_initialized():
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        if change is None:
            return False
        change(setting)
    os.environ[ALLOCATOR_VARIABLES[0]] = setting
    return True
