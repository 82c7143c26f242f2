"""Gradients of the adapters of up to three linears that share their input, in one pass over input and gradients.

Shapes: x (M, K), g_i (M, O_i) side by side, p = s_i g_i B_i and t = x A_i^T (M, R), r_i columns of each linear i::

    dA = p^T x          (R, K), the A_i on top of each other (or of other linears, of another rank in all)
    dB_i = s_i g_i^T t_i        (O_i, r_i)

Bytes: x and g once. The four products apart read them once as well, but at 60% of what a copy reaches, since a product
of so few columns has few programs; here the programs of all of them run beside each other, and each takes a share of
the rows. The shares' sums are added in a fixed order by :mod:`unsloth.kernels.column_sum`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.kernels import dispatch
from unsloth.kernels.append_projection import matmul_wide
from unsloth.kernels.column_sum import column_sum

_MOST_RANK = 128
_BLOCK_N = 128


def adapter_products_reference(
    x: torch.Tensor,
    p: torch.Tensor,
    g: torch.Tensor,
    t: torch.Tensor,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    rank_a: int | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The formula, a product at a time."""
    used = sum(ranks)
    parts = zip(g.split(list(outs), 1), t[:, :used].split(list(ranks), 1), scales, strict=True)
    da = matmul_wide(p[:, : used if rank_a is None else rank_a].t(), x)
    return da, [matmul_wide(gi.t(), ti).mul_(s) for gi, ti, s in parts]


def adapter_products(
    x: torch.Tensor,
    p: torch.Tensor,
    g: torch.Tensor,
    t: torch.Tensor,
    outs: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    rank_a: int | None = None,
    *,
    fast: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """dA, and dB of every linear, in float32 (float64 for float64).

    Args:
        x: (M, K).
        p: (M, R) or wider, of x's dtype.
        g: (M, O_0 + O_1 + ...) of x's dtype.
        t: Like ``p``.
        outs: O_i.
        ranks: r_i, which add up to R.
        scales: s_i.
        rank_a: R where ``p`` is of other linears than ``g`` and ``t``; None if it is the r_i's sum.
        fast: False takes the plain-torch reference.

    Returns:
        ``(dA (R, K), [dB_i (O_i, r_i)])``.
    """
    rows, features = x.shape
    rank_a = sum(ranks) if rank_a is None else rank_a
    if not (fast and _takes_kernel(x, p, g, t, ranks, rank_a)):
        return adapter_products_reference(x, p, g, t, outs, ranks, scales, rank_a)
    blocks = [triton.cdiv(n, _BLOCK_N) for n in (features, *outs)]
    shape, early = _tile(max(ranks), rank_a), dispatch.overlaps_launches(x.device)
    tiles = triton.cdiv(rows, shape["BLOCK_M"])
    splits = max(1, min(tiles, 2 * dispatch.processor_count(x.device) // sum(blocks)))
    share = triton.cdiv(tiles, splits) * shape["BLOCK_M"]
    splits = triton.cdiv(rows, share)
    sizes = [rank_a * features, *(out * r for out, r in zip(outs, ranks, strict=True))]
    sums = torch.empty(splits, sum(sizes), dtype=torch.float32, device=x.device)
    three = [[*values, *[0] * (3 - len(values))] for values in (outs, ranks, blocks[1:])]
    factors = [float(s) for s in (*scales, 0, 0)[:3]]  # all of one type: the kernel picks one of them
    with dispatch.launch_on(x):
        adapter_products_kernel[(sum(blocks), splits)](
            x, p, g, t, sums, rows, share, features, rank_a, *three[0], *three[1], blocks[0], *three[2][:2], *factors,
            x.stride(0), p.stride(0), g.stride(0), t.stride(0), EARLY=early, UPCAST=dispatch.interpreting(), **shape,
            **dispatch.early_launch(early),
        )  # fmt: skip
    total = sums[0] if splits == 1 else column_sum(sums, torch.float32)
    da, *db = total.split(sizes)
    return da.view(-1, features), [part.view(out, -1) for part, out in zip(db, outs, strict=True)]


def _takes_kernel(
    x: torch.Tensor, p: torch.Tensor, g: torch.Tensor, t: torch.Tensor, ranks: Sequence[int], rank_a: int
) -> bool:
    """Whether the kernel runs here and takes these: its tiles need the shared memory of Hopper and later."""
    fits = 0 < len(ranks) <= 3 and min(ranks) > 0 and max(sum(ranks), rank_a) <= _MOST_RANK and x.numel() > 0
    fits = fits and all(tensor.stride(1) == 1 for tensor in (x, p, g, t))
    if not fits or not dispatch.can_launch(x, p, g, t, dtypes=(torch.float16, torch.bfloat16)):
        return False
    return dispatch.interpreting() or dispatch.capability(x.device) >= (9, 0)


def _tile(rank: int, used: int) -> dict[str, int]:
    block_b, block_a = (max(16, triton.next_power_of_2(r)) for r in (rank, used))
    return {
        "BLOCK_M": 64, "BLOCK_N": _BLOCK_N, "BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


@triton.jit
def _product(
    wide, thin, wide_stride, thin_stride, first, last, n, columns, r, rank, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_R) of ``wide^T thin`` over the rows from ``first`` to ``last``."""
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        m = row[:, None].to(tl.int64)
        w = tl.load(wide + m * wide_stride + n[None, :], (row[:, None] < last) & (n[None, :] < columns), other=0.0)
        v = tl.load(thin + m * thin_stride + r[None, :], (row[:, None] < last) & (r[None, :] < rank), other=0.0)
        if UPCAST:
            w, v = w.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(tl.trans(w), v, acc, input_precision="ieee")
    return acc


@triton.jit
def adapter_products_kernel(
    x, p, g, t, sums, rows, share, K, R, O0, O1, O2, R0, R1, R2, blocks_a, blocks0, blocks1, scale0, scale1, scale2,
    x_stride, p_stride, g_stride, t_stride, EARLY: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program a block of columns of x or of one g_i, and a share of the rows.

    A share's sums lie one after the other: dA, dB_0, dB_1, dB_2.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    first = split * share
    last = tl.minimum(first + share, rows)
    if EARLY:
        gdc_wait()
    sums += split.to(tl.int64) * (R * K + O0 * R0 + O1 * R1 + O2 * R2)
    lane = tl.arange(0, BLOCK_N)
    if pid < blocks_a:
        k = pid * BLOCK_N + lane
        r = tl.arange(0, BLOCK_A)
        da = _product(x, p, x_stride, p_stride, first, last, k, K, r, R, UPCAST, BLOCK_M, BLOCK_N, BLOCK_A)
        tl.store(sums + r[:, None] * K + k[None, :], tl.trans(da), (r[:, None] < R) & (k[None, :] < K))
    else:
        block = pid - blocks_a
        sums += R * K
        out, rank, scale = O0, R0, scale0
        if block >= blocks0 + blocks1:
            block -= blocks0 + blocks1
            sums += O0 * R0 + O1 * R1
            g += O0 + O1
            t += R0 + R1
            out, rank, scale = O2, R2, scale2
        elif block >= blocks0:
            block -= blocks0
            sums += O0 * R0
            g += O0
            t += R0
            out, rank, scale = O1, R1, scale1
        o = block * BLOCK_N + lane
        c = tl.arange(0, BLOCK_B)
        db = _product(g, t, g_stride, t_stride, first, last, o, out, c, rank, UPCAST, BLOCK_M, BLOCK_N, BLOCK_B)
        tl.store(sums + o[:, None] * rank + c[None, :], db * scale, (o[:, None] < out) & (c[None, :] < rank))


def compile_examples(float_dtype: str) -> list[tuple]:
    """The kernel as it is launched for q/k/v of rank 32; on cards before Hopper it is never launched."""
    if float_dtype == "fp16":
        return []
    shape = _tile(32, 96)
    options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
    names = [name for name in adapter_products_kernel.arg_names if name not in (*shape, "EARLY", "UPCAST")]
    signature = dict.fromkeys(names, "i32") | {f"scale{i}": "fp32" for i in range(3)} | {"sums": "*fp32"}
    signature |= dict.fromkeys(("x", "p", "g", "t"), f"*{float_dtype}")
    return [(adapter_products_kernel, signature, {**shape, "EARLY": False, "UPCAST": False}, options)]
