"""Which device a run uses, what it can do, and how much memory it has left."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from unsloth.core import settings


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_bfloat16_supported() -> bool:
    """Whether to train in bfloat16 rather than float16.

    True on CUDA devices of compute capability 8.0 and later, and on the CPU, where float16 training is not an
    option at all (``fp16 = not is_bfloat16_supported()`` is a common line in training scripts).
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return True


def default_dtype(device: torch.device | None = None) -> torch.dtype:
    """The dtype that ``dtype=None`` means: bfloat16 where supported, else float16.

    On a CPU without bfloat16 instructions it is float32, which is several times faster there. With
    ``UNSLOTH_FORCE_FLOAT32=1`` it is float32 instead of float16, for models whose activations exceed its range.
    """
    device = device or default_device()
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if is_bfloat16_supported():
        return torch.bfloat16
    return torch.float32 if settings.force_float32() else torch.float16


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or ARM's BF16 extension)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(text.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else kib * 1024
