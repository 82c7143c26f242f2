"""Rows of a matrix in host memory, gathered by the GPU itself: ``y[i] = weight[ids[i]]``.

The matrix is pinned (see :mod:`unsloth.memory.pinned`), so kernels read it by its address over the bus. Only the rows
that are asked for travel, and the host neither waits for the ids nor touches the rows. Bytes over the bus: M K values.
Shapes: M ids, V rows of K values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch


def host_gather_reference(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The formula, with the ids brought to the host and the rows brought back."""
    return torch.nn.functional.embedding(ids.to(weight.device), weight).to(ids.device)


@triton.jit
def host_gather_kernel(address, ids, out, columns, rows, BLOCK: tl.constexpr):
    """One program copies a piece of a row; ids outside the matrix give NaN."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + i).to(tl.int64)
    weight = address.to(tl.pointer_type(out.dtype.element_ty))
    there = tl.where((row >= 0) & (row < rows), columns, 0)
    value = tl.load(weight + row * columns + column, mask=column < there, other=float("nan"))
    tl.store(out + i * columns + column, value, mask=column < columns)


def host_gather(weight: torch.Tensor, ids: torch.Tensor, *, fast: bool = True) -> torch.Tensor:
    """Rows of ``weight`` on the device of ``ids``, without autograd.

    Args:
        weight: (V, K) contiguous, on the host; pinned where ``ids`` are on a GPU.
        ids: Integers of any shape.
        fast: False for the reference.

    Returns:
        (*ids.shape, K); rows of NaN for ids outside the matrix.
    """
    if weight.dim() != 2 or not weight.is_contiguous() or not len(weight):
        got = (tuple(weight.shape), weight.stride())
        raise ConfigError("host_gather: the weight must be a contiguous matrix", got=got, do="Pass (V, K) on the host.")
    dispatch.check_integers("host_gather", ids=ids)
    if "meta" in (weight.device.type, ids.device.type):
        devices = (str(weight.device), str(ids.device))
        raise ConfigError("host_gather: weight or ids have no values", got=devices, do="Load the weight first.")
    out = torch.empty((*ids.shape, weight.shape[1]), dtype=weight.dtype, device=ids.device)
    if not (fast and dispatch.can_launch(out)) or weight.is_cuda:
        return host_gather_reference(weight, ids)
    ids = ids.contiguous()
    if out.numel():
        block = min(4096, triton.next_power_of_2(weight.shape[1]))
        with dispatch.launch_on(out):
            host_gather_kernel[(ids.numel(), triton.cdiv(weight.shape[1], block))](
                weight.data_ptr(), ids, out, weight.shape[1], weight.shape[0], BLOCK=block
            )
    return out


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test."""
    signature = {"address": "i64", "ids": "*i64", "out": f"*{float_dtype}", "columns": "i32", "rows": "i32"}
    return [(host_gather_kernel, signature, {"BLOCK": 4096})]
