"""Copy a matrix into a wider buffer and append its product with a thin one, in one pass: ``[x | x P]``.

Shapes: x (M, K), P (K, R) with R small (the ranks of a few adapters). The LoRA ops feed the result to one matrix
product over K + R columns, in place of a product, a thin product and an accumulation into the output. Reading x once
for both the copy and the thin product costs what the copy alone costs.

Bytes: 2 M K elements, against 3 M K for a copy and a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.kernels import dispatch
from unsloth.kernels.rounding import must_round, nearest

_MOST_COLUMNS = 128


def append_projection_reference(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """``[x | x @ projection]`` in plain torch."""
    return torch.cat([x, x @ projection], dim=1)


@triton.jit
def append_rows(
    x_ptr, p_ptr, copy_ptr, tail_ptr, kept_ptr, M, K, R, x_stride, p_stride_k, p_stride_r, copy_stride, tail_stride,
    KEEP: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A block of rows, that of the grid's first number: all of K in steps, copied while it is multiplied."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = rows[:, None].to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + k
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        x = tl.load(x_ptr + m * x_stride + columns[None, :], mask=inside, other=0.0)
        p = tl.load(
            p_ptr + columns[:, None] * p_stride_k + r[None, :] * p_stride_r,
            mask=(columns[:, None] < K) & (r[None, :] < R),
            other=0.0,
        )
        tl.store(copy_ptr + m * copy_stride + columns[None, :], x, mask=inside)
        if UPCAST:
            x, p = x.to(tl.float32), p.to(tl.float32)
        acc = tl.dot(x, p, acc, input_precision="ieee")
    acc, inside = nearest(acc, ROUND), (rows[:, None] < M) & (r[None, :] < R)
    tl.store(tail_ptr + m * tail_stride + r[None, :], acc, mask=inside)
    if KEEP:
        tl.store(kept_ptr + m * R + r[None, :], acc, mask=inside)


@triton.jit
def append_projection_kernel(
    x_ptr, p_ptr, copy_ptr, tail_ptr, kept_ptr, M, K, R, x_stride, p_stride_k, p_stride_r, copy_stride, tail_stride,
    EARLY: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program a block of rows."""
    if EARLY:
        gdc_wait()
    append_rows(
        x_ptr, p_ptr, copy_ptr, tail_ptr, kept_ptr, M, K, R, x_stride, p_stride_k, p_stride_r, copy_stride, tail_stride,
        KEEP, UPCAST, ROUND, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit
def append_three_kernel(
    x0_ptr, x1_ptr, x2_ptr, p_ptr, copy_ptr, tail_ptr, M, K0, K1, K2, R0, R1, R2, x0_stride, x1_stride, x2_stride,
    p_stride, copy_stride, tail_stride, EARLY: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program a block of rows of one of three matrices, whose projections lie on the diagonal of ``p``."""
    if EARLY:
        gdc_wait()
    part = tl.program_id(1)
    if part == 0:
        append_rows(
            x0_ptr, p_ptr, copy_ptr, tail_ptr, tail_ptr, M, K0, R0, x0_stride, p_stride, 1, copy_stride, tail_stride,
            False, UPCAST, ROUND, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    elif part == 1:
        append_rows(
            x1_ptr, p_ptr + K0 * p_stride + R0, copy_ptr + K0, tail_ptr + R0, tail_ptr, M, K1, R1, x1_stride, p_stride,
            1, copy_stride, tail_stride, False, UPCAST, ROUND, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        append_rows(
            x2_ptr, p_ptr + (K0 + K1) * p_stride + R0 + R1, copy_ptr + K0 + K1, tail_ptr + R0 + R1, tail_ptr, M, K2, R2,
            x2_stride, p_stride, 1, copy_stride, tail_stride, False, UPCAST, ROUND, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def append_projection(
    x: torch.Tensor,
    projection: torch.Tensor,
    tail: torch.Tensor,
    copy: torch.Tensor | None = None,
    *,
    kept: torch.Tensor | None = None,
) -> None:
    """Write ``x @ projection`` into ``tail`` (and ``kept``), and x into ``copy``.

    Args:
        x: (M, K), any strides (a copy is made unless that along K is 1).
        projection: (K, R) of the same dtype, any strides.
        tail: (M, R), unit stride along R.
        copy: (M, K), unit stride along K; None to leave the copy out, which makes it torch's product.
        kept: (M, R), contiguous, for the product once more.
    """
    rows, features = x.shape
    rank = projection.shape[1]
    kernel_takes_it = 0 < rank <= _MOST_COLUMNS and rows > 0 and features > 0
    if copy is None or not kernel_takes_it or not dispatch.can_launch(x, projection, tail):
        if copy is not None:
            copy.copy_(x)
        # Not from columns of a wider buffer on a CPU: oneDNN may read a row beyond its end (see HeadChunks.gradient).
        torch.mm(x if x.is_cuda else x.contiguous(), projection, out=tail)
        if kept is not None:
            kept.copy_(tail)
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    shape, early = _tile(x, rank), dispatch.overlaps_launches(x.device)
    with dispatch.launch_on(x):
        append_projection_kernel[(triton.cdiv(rows, shape["BLOCK_M"]),)](
            x,
            projection,
            copy,
            tail,
            tail if kept is None else kept,
            rows,
            features,
            rank,
            x.stride(0),
            projection.stride(0),
            projection.stride(1),
            copy.stride(0),
            tail.stride(0),
            EARLY=early,
            KEEP=kept is not None,
            UPCAST=dispatch.interpreting(),
            ROUND=must_round(tail.dtype),
            **shape,
            **dispatch.early_launch(early),
        )


def append_projections(
    parts: Sequence[torch.Tensor], projection: torch.Tensor, ranks: Sequence[int], wide: torch.Tensor
) -> None:
    """Write ``[x_0 | x_1 | ... | x_0 P_0 | x_1 P_1 | ...]`` into ``wide``; three parts take one launch.

    Args:
        parts: x_i (M, K_i) of one dtype.
        projection: (K_0 + K_1 + ..., R_0 + R_1 + ...) with P_i (K_i, R_i) on its diagonal, unit stride along R.
        ranks: R_i, of which any may be 0.
        wide: (M, K_0 + ... + R_0 + ...) or wider, unit stride along the columns; what is beyond is left alone.
    """
    rows, total = parts[0].shape[0], sum(part.shape[1] for part in parts)
    tail = wide[:, total:]
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    fits = len(parts) == 3 and 0 < min(ranks) and max(ranks) <= _MOST_COLUMNS and rows > 0
    if fits and dispatch.can_launch(*parts, projection, wide):
        shape, early = _tile(wide, max(ranks)), dispatch.overlaps_launches(wide.device)
        with dispatch.launch_on(wide):
            append_three_kernel[(triton.cdiv(rows, shape["BLOCK_M"]), 3)](
                *parts, projection, wide, tail, rows, *(part.shape[1] for part in parts), *ranks,
                *(part.stride(0) for part in parts), projection.stride(0), wide.stride(0), tail.stride(0),
                EARLY=early, UPCAST=dispatch.interpreting(), ROUND=must_round(wide.dtype), **shape,
                **dispatch.early_launch(early),
            )  # fmt: skip
        return
    column = rank = 0
    for part, r in zip(parts, ranks, strict=True):
        columns = slice(column, column + part.shape[1])
        if r:
            append_projection(
                part, projection[columns, rank : rank + r], tail[:, rank : rank + r], copy=wide[:, columns]
            )
        else:
            wide[:, columns].copy_(part)
        column, rank = columns.stop, rank + r


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` out of a float32 accumulator (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _tile(x: torch.Tensor, rank: int) -> dict[str, int]:
    """Tile and launch options; three stages of a tile stay under 64 KiB of shared memory before Hopper."""
    block_r = max(16, triton.next_power_of_2(rank))
    narrow = x.dtype.itemsize > 2 or block_r > 64
    if x.is_cuda and dispatch.capability(x.device) >= (9, 0) and x.dtype.itemsize == 2:
        return {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": block_r, "num_warps": 8, "num_stages": 5}
    return {"BLOCK_M": 32, "BLOCK_K": 32 if narrow else 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 3}


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test: A's layout for activations, B's for gradients."""
    integers = dict.fromkeys(("M", "K", "R", "x_stride", "copy_stride", "tail_stride"), "i32")
    pointers = dict.fromkeys(("x_ptr", "p_ptr", "copy_ptr", "tail_ptr", "kept_ptr"), f"*{float_dtype}")
    shape = {"EARLY": False, "UPCAST": False, "ROUND": False, "BLOCK_M": 32, "BLOCK_R": 32, "BLOCK_K": 64}
    strides = dict.fromkeys(("p_stride_k", "p_stride_r"), "i32")
    names = [name for name in append_three_kernel.arg_names if name not in shape]
    three = {name: f"*{float_dtype}" if name.endswith("_ptr") else "i32" for name in names}
    return [
        (append_projection_kernel, integers | pointers | strides, {**shape, "KEEP": True, "p_stride_k": 1}),
        (
            append_projection_kernel,
            integers | pointers | strides,
            {**shape, "KEEP": False, "p_stride_r": 1, "BLOCK_R": 128},
        ),
        (append_three_kernel, three, shape),
    ]
