"""Where a Triton kernel may run: CUDA devices, and the CPU under Triton's interpreter.

Every public function of this package asks :func:`can_launch` and takes its plain-torch reference when the answer is
no, so that one code path serves GPUs, CPUs and dtypes that no kernel knows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton

from unsloth.core.errors import ConfigError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether kernels are run by Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return bool(triton.knobs.runtime.interpret)


def can_launch(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> bool:
    """Whether Triton can take these tensors: one device that runs kernels, and dtypes among ``dtypes``.

    None entries (absent optional inputs) are skipped.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    if any(tensor.device != device or tensor.dtype not in dtypes for tensor in present):
        return False
    if device.type == "cuda":
        return capability(device) >= (7, 5)
    return device.type == "cpu" and interpreting()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: float32 for 16-bit inputs, and float64 for float64 ones."""
    return torch.promote_types(dtype, torch.float32)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def processor_count(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 for the interpreter, where every program costs milliseconds."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; next to nothing for the interpreter, which has no use for tables there."""
    return 0 if interpreting() else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and capability(device) >= (9, 0)


def early_launch(early: bool) -> dict[str, bool]:
    """Launch options of a kernel that may be launched before the one ahead of it has ended, and waits on the device."""
    return {"launch_pdl": True} if early else {}


def launch_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on ``tensor``'s device (Triton launches on the current one)."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise unless every given tensor is floating point and all are on one device.

    Args:
        op: Name of the operation, for the message.
        tensors: Inputs by name; None entries are skipped.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in present.items())
    for name, tensor in present.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{op}: {name} is not floating point", got=tensor.dtype, do="Cast it first.")
        if tensor.device != device:
            do = f"Move both to one device; {first} is on {device}."
            raise ConfigError(f"{op}: {name} is on another device", got=str(tensor.device), do=do)


def check_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` (None passes) has ``shape``."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ConfigError(
            f"{op}: {name} has the wrong shape", got=tuple(tensor.shape), do=f"Pass a tensor of shape {tuple(shape)}."
        )


def check_device(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise unless every given tensor, of whatever dtype, is on ``device``; None entries are skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            do = f"Move it to {device}, where the other inputs are."
            raise ConfigError(f"{op}: {name} is on another device", got=str(tensor.device), do=do)


def check_integers(op: str, **tensors: torch.Tensor) -> None:
    """Raise unless every given tensor holds int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ConfigError(f"{op}: {name} must hold integers", got=tensor.dtype, do="Pass int32 or int64.")


def adjacent(vector: torch.Tensor | None) -> torch.Tensor | None:
    """``vector`` [N] with its elements next to each other, as kernels read parameters; copies only if it must."""
    return vector if vector is None or vector.dim() != 1 or vector.stride(0) == 1 else vector.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix over its last dimension, whose elements are adjacent; copies only if strides demand it."""
    matrix = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()
