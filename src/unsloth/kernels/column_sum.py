"""Sum of a float32 matrix over its rows, rounded once: the last step of the gradients of norm weights.

    y[n] = sum over r of x[r, n]

The norms' backward kernels leave one row of partial sums a program; this adds them in a fixed order, so that results
do not change from run to run, in one launch instead of the two of ``x.sum(0).to(dtype)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.kernels.dispatch import can_launch, launch_on


def column_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum ``x`` [R, N] over its rows.

    Args:
        x: float32 matrix with adjacent columns.
        dtype: Dtype of the result.

    Returns:
        Tensor [N].
    """
    rows, n = x.shape
    if not can_launch(x, dtypes=(torch.float32,)) or not n or x.stride(1) != 1:
        return column_sum_reference(x, dtype)
    y = torch.empty(n, dtype=dtype, device=x.device)
    with launch_on(x):
        column_sum_kernel[(triton.cdiv(n, 16),)](x, y, rows, n, x.stride(0), ROWS=256, BLOCK=16, num_warps=8)
    return y


def column_sum_reference(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The formula in plain torch."""
    return x.sum(0).to(dtype)


@triton.jit
def column_sum_kernel(x, y, rows, n, stride_x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums BLOCK columns."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + row.to(tl.int64) * stride_x + col, (row < rows) & (col < n), other=0.0).to(tl.float32)
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + out, tl.sum(total, 0).to(y.dtype.element_ty), out < n)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"x": "*fp32", "y": f"*{float_dtype}", "rows": "i32", "n": "i32", "stride_x": "i32"}
    return [(column_sum_kernel, signature, {"ROWS": 256, "BLOCK": 16}, {"num_warps": 8})]
