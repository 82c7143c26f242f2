"""What RMSNorm and LayerNorm share around their kernels: checks, result buffers, and how rows are divided.

A program holds whole rows in registers, so that a row is read once. Where gradients of parameters are summed,
programs loop over rows and leave a row of partial sums each, see :mod:`unsloth.kernels.column_sum`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.kernels.dispatch import can_launch, check_shape, check_tensors

MAX_COLUMNS = 32768


def takes_kernel(
    op: str, x: torch.Tensor, residual: torch.Tensor | None = None, **parameters: torch.Tensor | None
) -> bool:
    """Check the inputs of a normalization of the last dimension, and say whether its kernel can take them.

    Args:
        op: Name of the operation, for messages.
        x: Tensor [..., N].
        residual: Tensor of x's shape, or None.
        parameters: Tensors [N] by name, or None.
    """
    check_tensors(op, x=x, residual=residual, **parameters)
    for name, parameter in parameters.items():
        check_shape(op, name, parameter, tuple(x.shape[-1:]))
    check_shape(op, "residual", residual, tuple(x.shape))
    same = residual is None or x.dtype == residual.dtype
    return same and x.shape[-1] <= MAX_COLUMNS and can_launch(x, residual, *parameters.values())


def result_buffers(
    x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y, h)`` for matrices: y is ``out`` or new, h is x itself where nothing is added, else as wide as the sum."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if residual is None:
        return y, x
    return y, torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)


@triton.jit
def load_sum(x, residual, h, row, col, mask, n, stride_x, stride_r, ADD: tl.constexpr):
    """A tile of x in float32; with ADD the residual is added, and the sum rounded and stored to the contiguous h."""
    value = tl.load(x + row * stride_x + col, mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * stride_r + col, mask, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * n + col, rounded, mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def add_two(a0, b0, a1, b1):
    """Sums of two pairs."""
    return a0 + a1, b0 + b1


@triton.jit
def two_sums(a, b, TOGETHER: tl.constexpr):
    """Sums of two tiles over their columns, with TOGETHER in one round of exchanges between the threads."""
    if TOGETHER:
        return tl.reduce((a, b), 1, add_two)
    else:
        return tl.sum(a, 1), tl.sum(b, 1)


def row_stride(x: torch.Tensor | None) -> int:
    """Distance of a matrix's rows in elements, 0 for None."""
    return 0 if x is None else x.stride(0)


def equal_shares(tiles: int, most: int) -> int:
    """At most ``most`` programs, of which none has a tile less than it could: the last ones end together."""
    return triton.cdiv(tiles, triton.cdiv(tiles, min(tiles, most)))


def launch_shape(n: int) -> tuple[int, int, int]:
    """Columns of a tile, rows of a tile, warps: 16 elements a thread, several short rows to a program."""
    block = triton.next_power_of_2(n)
    tile = max(1, 1024 // block)
    return block, tile, min(16, max(1, block * tile // 512))
