"""Sum of a float32 matrix over its rows, rounded once: the last step of the gradients of norm weights.

    y[n] = sum over r of x[r, n]

Kernels whose programs share a sum leave one row of partial sums a program or share; this adds them in a fixed order, so
that results do not change from run to run, in one launch instead of the two of ``x.sum(0).to(dtype)``. On Hopper and
later it is launched while the kernel before it is still at work, and waits on the device for its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.kernels.dispatch import can_launch, early_launch, launch_on, overlaps_launches


def column_sum(
    x: torch.Tensor, dtype: torch.dtype, split: int | None = None, *, also: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum ``x`` [R, N] over its rows.

    Args:
        x: float32 matrix with adjacent columns.
        dtype: Dtype of the result.
        split: Sum the rows before this one and the others apart; None for one sum.
        also: [A, B] of ``dtype`` with A B = N and adjacent columns, into which the one sum is written once more.

    Returns:
        Tensor [N], or [2, N] with ``split``.
    """
    rows, n = x.shape
    if not can_launch(x, dtypes=(torch.float32,)) or not n or x.stride(1) != 1:
        total = column_sum_reference(x, dtype, split)
        if also is not None:
            also.copy_(total.view(also.shape))
        return total
    y = torch.empty((n,) if split is None else (2, n), dtype=dtype, device=x.device)
    early = overlaps_launches(x.device)
    tile, block, warps = launch_shape(rows)
    with launch_on(x):
        column_sum_kernel[(triton.cdiv(n, block), 1 if split is None else 2)](
            x, y, y if also is None else also, rows, rows if split is None else split, n, x.stride(0),
            *((1, 1) if also is None else (also.shape[1], also.stride(0))), EARLY=early, ALSO=also is not None,
            ROWS=tile, BLOCK=block, num_warps=warps, **early_launch(early),
        )  # fmt: skip
    return y


def launch_shape(rows: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, warps: a few long rows, or many of which each program takes few columns."""
    if rows <= 16:
        return triton.next_power_of_2(max(rows, 1)), 512, 4
    return 256 if rows <= 256 else 512, 16, 8


def column_sum_reference(x: torch.Tensor, dtype: torch.dtype, split: int | None = None) -> torch.Tensor:
    """The formula in plain torch."""
    return x.sum(0).to(dtype) if split is None else torch.stack((x[:split].sum(0), x[split:].sum(0))).to(dtype)


@triton.jit
def column_sum_kernel(
    x, y, also, rows, split, n, stride_x, columns, stride_also, EARLY: tl.constexpr, ALSO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK columns, of the rows before ``split`` or (second row of the grid) of the others."""
    if EARLY:
        gdc_wait()
    part = tl.program_id(1)
    first = tl.where(part == 0, 0, split)
    last = tl.where(part == 0, split, rows)
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + row.to(tl.int64) * stride_x + col, (row < last) & (col < n), other=0.0).to(tl.float32)
    out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(total, 0).to(y.dtype.element_ty)
    tl.store(y + part * n + out, total, out < n)
    if ALSO:
        tl.store(also + out // columns * stride_also + out % columns, total, out < n)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"x": "*fp32", "y": f"*{float_dtype}", "also": f"*{float_dtype}"}
    signature |= dict.fromkeys(("rows", "split", "n", "stride_x", "columns", "stride_also"), "i32")
    shapes = [launch_shape(rows) for rows in (4, 256)]
    return [
        (
            column_sum_kernel,
            signature,
            {"EARLY": False, "ALSO": rows < 256, "ROWS": rows, "BLOCK": block},
            {"num_warps": warps},
        )
        for rows, block, warps in shapes
    ]
