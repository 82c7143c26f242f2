r"""Linears with 4-bit weights and adapters, for the few rows of a decoding step.

Several linears of one input (q/k/v, gate/up), M rows of x, adapters A_i (r_i, K), B_i (N_i, r_i), scale s_i (Hu et al.
2021, arXiv:2106.09685)::

    t = x [A_0; A_1; ...]^T                 y_i = x W_i^T + s_i t_i B_i^T

One launch makes t for all of them, in float32 and in parts of K, which are added where they are read, by every tile of
the product; one launch multiplies with all W_i (or one with each, where they differ in kind) and adds the adapters'
parts before y_i is rounded. It begins while t is still being made, and waits for it only where it adds it. Bytes:
packed W once, A and B once; t is a few kilobytes. Separate products would launch two to three kernels more a linear,
which take longer than their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import (
    as_rows,
    can_launch,
    check_tensors,
    interpreting,
    launch_on,
    overlaps_launches,
)
from unsloth.kernels.nf4 import NF4Weight, assembly
from unsloth.kernels.nf4_fragments import LowRank, launch_together, multiply_fragments
from unsloth.kernels.nf4_matmul import arrange_for_tiles, multiply_tiles, nf4_linear, product_kernel
from unsloth.kernels.side_by_side import side_by_side

STEP = 512  # columns of x that a program multiplies at a time
FETCH_LINE = assembly("prefetch.global.L2 [$1];", "mov.b32 $0, 0;")


@dataclass(frozen=True)
class StackedAdapters:
    """Adapters of linears that share their input, in the dtype of the activations.

    Attributes:
        a: [R, K], contiguous: A_0, A_1, ... on top of each other.
        b: B_i [N_i, r_i], contiguous; the r_i add up to R.
        scales: s_i.
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        ranks = [b.shape[-1] for b in self.b]
        same = (
            self.a.dim() == 2
            and all(b.dim() == 2 for b in self.b)
            and all(b.dtype == self.a.dtype and b.is_contiguous() for b in self.b)
        )
        if sum(ranks) != self.a.shape[0] or len(self.scales) != len(ranks) or not same or not self.a.is_contiguous():
            got = (tuple(self.a.shape), [tuple(b.shape) for b in self.b], len(self.scales))
            do = "Pass contiguous A [R, K] and B [N, r] of one dtype, with the ranks r adding up to R."
            raise ConfigError("Stacked adapters do not fit together", got=got, do=do)

    def side(self, projections: torch.Tensor, group: slice) -> LowRank:
        """What is added to the products of some neighbouring linears; ``projections`` are :func:`project_few`'s."""
        first = sum(b.shape[1] for b in self.b[: group.start or 0])
        return LowRank(projections, first, self.b[group], self.scales[group])


def nf4_lora_linears(
    x: torch.Tensor,
    weights: Sequence[NF4Weight],
    adapters: StackedAdapters | None,
    *,
    fast: bool = True,
) -> list[torch.Tensor]:
    """Multiply ``x`` by 4-bit matrices with adapters; no gradient.

    Args:
        x: [..., K].
        weights: Matrices [N_i, K].
        adapters: Of these linears, or None.
        fast: False takes the plain-torch reference.

    Returns:
        One [..., N_i] a matrix, of x's dtype.
    """
    if adapters is not None and len(adapters.b) != len(weights):
        got = (len(adapters.b), len(weights))
        raise ConfigError("nf4_lora_linears: one adapter a matrix is needed", got=got, do="Stack as many as matrices.")
    x = x.detach()
    check_tensors("nf4_lora_linears", x=x)
    fit = x.dim() > 0 and all(w.shape[1] == x.shape[-1] and w.packed.device == x.device for w in weights)
    if adapters is not None:
        check_tensors("nf4_lora_linears", x=x, a=adapters.a, **{f"b{i}": b for i, b in enumerate(adapters.b)})
        same = [b.shape[0] for b in adapters.b] == [weight.shape[0] for weight in weights]
        fit = fit and adapters.a.shape[1] == x.shape[-1] and same
    if not fit:
        stacked = None if adapters is None else (tuple(adapters.a.shape), [tuple(b.shape) for b in adapters.b])
        do = f"Pass x [..., K], A [R, K] and B [N, r] for weights {[w.shape for w in weights]}, on their device."
        raise ConfigError("nf4_lora_linears: inputs do not fit the weights", got=(tuple(x.shape), stacked), do=do)
    rows = as_rows(x)
    multiply = joined_product(rows, weights, adapters) if fast else None
    if multiply is None:
        return _one_by_one(x, weights, adapters, fast)
    if multiply is multiply_tiles:  # before the projections, so that the products need not wait for it
        multiply = partial(multiply_tiles, arranged=arrange_for_tiles(rows))
    low = None if adapters is None else project_few(rows, adapters.a)
    together = launch_together(weights) and (adapters is None or len({b.shape[1] for b in adapters.b}) == 1)
    groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(weights))]
    products = [
        partial(multiply, rows, weights[group], side=None if adapters is None else adapters.side(low, group))
        for group in groups
    ]
    outputs = [y for group in side_by_side(products, x.device) for y in group]
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def joined_product(
    x: torch.Tensor, weights: Sequence[NF4Weight], adapters: StackedAdapters | None
) -> Callable[..., list[torch.Tensor]] | None:
    """The kernel that adds adapters within products of ``x`` [M, K], or None where there is none for these."""
    ranks = [] if adapters is None else [b.shape[1] for b in adapters.b]
    if not x.shape[0] or not can_launch(x) or any(rank % 16 for rank in ranks):
        return None
    if adapters is not None and adapters.a.dtype != x.dtype:
        return None
    multiply = product_kernel(x, weights)
    powers = all(rank & (rank - 1) == 0 for rank in ranks)
    return multiply if powers or multiply is multiply_fragments else None


def _one_by_one(
    x: torch.Tensor, weights: Sequence[NF4Weight], adapters: StackedAdapters | None, fast: bool
) -> list[torch.Tensor]:
    """The formula, a product at a time."""
    if adapters is None:
        return side_by_side([partial(nf4_linear, x, weight, fast=fast) for weight in weights], x.device)
    outputs, first = [], 0
    for weight, b, scale in zip(weights, adapters.b, adapters.scales, strict=True):
        a = adapters.a[first : first + b.shape[1]].to(x.dtype)
        outputs.append(nf4_linear(x, weight, fast=fast) + (x @ a.T) @ b.to(x.dtype).T * scale)
        first += b.shape[1]
    return outputs


def project_few(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Parts of ``x @ a.T`` over slices of K, which add up to it.

    Args:
        x: [M, K] with adjacent columns.
        a: [R, K], contiguous.

    Returns:
        float32 [parts, M, R].
    """
    (m, k), r = x.shape, a.shape[0]
    batch, most, stages = (16, 4, 2) if m <= 16 else (32, 2 if k <= 8192 else 4, 4)
    share = triton.cdiv(triton.cdiv(k, STEP), most) * STEP
    parts = triton.cdiv(k, share)
    t = torch.empty((parts, m, r), dtype=torch.float32, device=x.device)
    early = overlaps_launches(x.device)
    with launch_on(x):
        project_few_kernel[(triton.cdiv(r, 16), parts, triton.cdiv(m, batch))](
            x, a, t, m, r, k, share, x.stride(0), UPCAST=interpreting(), EARLY=early, BATCH=batch,
            STEP=STEP // (batch // 16), num_warps=4, num_stages=stages, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return t


@triton.jit(do_not_specialize=["m"])  # one compilation for every number of rows
def project_few_kernel(
    x, a, t, m, r, k, share, stride_x, UPCAST: tl.constexpr, EARLY: tl.constexpr, BATCH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One program multiplies 16 rows of a with a share of the columns of BATCH rows of x."""
    rank = tl.program_id(0) * 16 + tl.arange(0, 16)
    row = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    first = tl.program_id(1) * share
    if EARLY:  # in this order: a product launched early reads x, which the kernel ahead of this one may write
        for start in range(first, tl.minimum(first + share, k), STEP):  # a, which no kernel writes, into L2
            line = tl.minimum(start + tl.arange(0, STEP // 64) * 64, k - 1)
            at = a + tl.minimum(rank[:, None], r - 1) * k + line[None, :]
            tl.inline_asm_elementwise(FETCH_LINE, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
        gdc_wait()
        gdc_launch_dependents()
    part = tl.zeros((BATCH, 16), tl.float32)
    for start in range(first, tl.minimum(first + share, k), STEP):
        column = start + tl.arange(0, STEP)
        left_mask, right_mask = (row[:, None] < m) & (column[None, :] < k), (rank[None, :] < r) & (column[:, None] < k)
        left = tl.load(x + row[:, None] * stride_x + column[None, :], left_mask, other=0.0)
        right = tl.load(a + rank[None, :] * k + column[:, None], right_mask, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        part = tl.dot(left, right, part, input_precision="ieee")
    at = (tl.program_id(1) * m + row[:, None]) * r + rank[None, :]
    tl.store(t + at, part, (row[:, None] < m) & (rank[None, :] < r))


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    ptr = f"*{float_dtype}"
    signature = {"x": ptr, "a": ptr, "t": "*fp32"} | dict.fromkeys(("m", "r", "k", "share", "stride_x"), "i32")
    few, more = ({"UPCAST": False, "EARLY": False, "BATCH": rows, "STEP": STEP * 16 // rows} for rows in (16, 32))
    return [
        (project_few_kernel, signature, few, {"num_warps": 4, "num_stages": 2}),
        (project_few_kernel, signature, more, {"num_warps": 4, "num_stages": 4}),
    ]
