r"""Linears with adapters, for the few rows of a decoding step; weights of 4 or 16 bits.

Several linears of one input (q/k/v, gate/up), M rows of x, adapters A_i (r_i, K), B_i (N_i, r_i), scale s_i (Hu et al.
2021, arXiv:2106.09685), and the mask m (M, adapters) that says which adapter a row has, where there are several::

    t = x [A_0; A_1; ...]^T                 y_i = x W_i^T + s_i (m * t_i) B_i^T

One launch makes t for all of them, in float32 and in parts of K, which are added where they are read, by every tile of
the product; one launch multiplies with all W_i (or one with each, where they differ in kind) and adds the adapters'
parts before y_i is rounded. It begins while t is still being made, and waits for it only where it adds it. Bytes: W
once, A and B once; t is a few kilobytes. Separate products would launch two to three kernels more a linear, which take
longer than their bytes. The products are those of :mod:`unsloth.kernels.nf4_fragments`,
:mod:`unsloth.kernels.nf4_matmul` and :mod:`unsloth.kernels.dense_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels.dense_rows import multiply_dense, takes_dense
from unsloth.kernels.dispatch import (
    as_rows,
    can_launch,
    check_device,
    check_tensors,
    early_launch,
    interpreting,
    launch_on,
    overlaps_launches,
)
from unsloth.kernels.glu import ACTIVATIONS
from unsloth.kernels.glu_adapters import gated_activation_reference
from unsloth.kernels.joined_products import LowRank
from unsloth.kernels.nf4 import NF4Weight, assembly
from unsloth.kernels.nf4_fragments import launch_together
from unsloth.kernels.nf4_matmul import arrange_for_tiles, multiply_tiles, nf4_linear, product_kernel
from unsloth.kernels.side_by_side import side_by_side

Weight: TypeAlias = NF4Weight | torch.Tensor
Product: TypeAlias = Callable[..., list[torch.Tensor]]

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

    def side(self, projections: torch.Tensor, group: slice, mask: torch.Tensor | None = None) -> LowRank:
        """What is added to the products of some neighbouring linears; ``projections`` are :func:`project_few`'s."""
        first = sum(b.shape[1] for b in self.b[: group.start or 0])
        return LowRank(projections, first, self.b[group], self.scales[group], mask)


def decoding_linears(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None = None,
    *,
    fast: bool = True,
) -> list[torch.Tensor]:
    """Multiply ``x`` by matrices with adapters; no gradient.

    Args:
        x: [..., K].
        weights: Matrices [N_i, K].
        adapters: Of these linears, or None.
        mask: (M, adapters) for the M rows of x, 1 where the row has the adapter, else 0; each adapter's ranks are side
            by side and equally many. None: every row has every one.
        fast: False takes the plain-torch reference.

    Returns:
        One [..., N_i] a matrix, of x's dtype.
    """
    x = x.detach()
    _check("decoding_linears", x, weights, adapters, mask)
    rows = as_rows(x)
    multiply = joined_product(rows, weights, adapters, mask) if fast else None
    if multiply is None:
        outputs = _one_by_one(rows, weights, adapters, mask, fast)
    else:
        outputs = _joined(multiply, rows, weights, adapters, mask)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def decoding_gate(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None,
    activation: str,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """``act(y_0) * y_1`` [..., N] of the outputs of :func:`decoding_linears` for two matrices of one shape.

    Where one kernel does it all, the outputs are not rounded before the activation.
    """
    x = x.detach()
    _check("decoding_gate", x, weights, adapters, mask)
    if len(weights) != 2 or weights[0].shape != weights[1].shape or activation not in ACTIVATIONS:
        got, do = ([w.shape for w in weights], activation), f"Pass two matrices of one shape, and one of {ACTIVATIONS}."
        raise ConfigError("decoding_gate: no gated unit", got=got, do=do)
    rows = as_rows(x)
    if fast and gates(rows, weights, adapters, mask):
        (h,) = _joined(partial(multiply_dense, activation=activation), rows, weights, adapters, mask)
    else:
        gate, up = decoding_linears(rows, weights, adapters, mask, fast=fast)
        h = gated_activation_reference(gate, up, activation)
    return h.view(*x.shape[:-1], h.shape[1])


def gates(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None,
) -> bool:
    """Whether one kernel does all of :func:`decoding_gate` for these rows."""
    dense = [weight.shape for weight in weights if isinstance(weight, torch.Tensor)]
    pair = len(dense) == len(weights) == 2 and dense[0] == dense[1]
    return pair and _together(weights, adapters) and joined_product(x, weights, adapters, mask) is not None


def _check(
    op: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None,
) -> None:
    if adapters is not None and len(adapters.b) != len(weights):
        got = (len(adapters.b), len(weights))
        raise ConfigError(f"{op}: one adapter a matrix is needed", got=got, do="Stack as many as matrices.")
    check_tensors(op, x=x)
    devices = [w.packed.device if isinstance(w, NF4Weight) else w.device for w in weights]
    fit = x.dim() > 0 and all(w.shape[1] == x.shape[-1] for w in weights) and set(devices) <= {x.device}
    if adapters is not None:
        check_tensors(op, x=x, a=adapters.a, **{f"b{i}": b for i, b in enumerate(adapters.b)})
        same = [b.shape[0] for b in adapters.b] == [weight.shape[0] for weight in weights]
        fit = fit and adapters.a.shape[1] == x.shape[-1] and same
    if not fit:
        stacked = None if adapters is None else (tuple(adapters.a.shape), [tuple(b.shape) for b in adapters.b])
        do = f"Pass x [..., K], A [R, K] and B [N, r] for weights {[w.shape for w in weights]}, on their device."
        raise ConfigError(f"{op}: inputs do not fit the weights", got=(tuple(x.shape), stacked), do=do)
    if mask is not None:
        check_device(op, x.device, mask=mask)
        ranks = [] if adapters is None else [b.shape[1] for b in adapters.b]
        own = mask.dim() == 2 and len(mask) == x.shape[:-1].numel() and mask.shape[1] > 0
        if not own or any(rank % mask.shape[1] for rank in ranks):
            do = f"Pass (rows, adapters), with adapters dividing the ranks {ranks}."
            raise ConfigError(f"{op}: the mask does not fit", got=(tuple(mask.shape), tuple(x.shape)), do=do)


def _joined(
    multiply: Product,
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Outputs by ``multiply``, of :func:`joined_product`."""
    if multiply is multiply_tiles:  # before the projections, so that the products need not wait for it
        multiply = partial(multiply_tiles, arranged=arrange_for_tiles(x))
    low = None if adapters is None else project_few(x, adapters.a)
    groups = [slice(None)] if _together(weights, adapters) else [slice(i, i + 1) for i in range(len(weights))]
    products = [
        partial(multiply, x, weights[group], side=None if adapters is None else adapters.side(low, group, mask))
        for group in groups
    ]
    return [y for group in side_by_side(products, x.device) for y in group]


def joined_product(
    x: torch.Tensor, weights: Sequence[Weight], adapters: StackedAdapters | None, mask: torch.Tensor | None = None
) -> Product | None:
    """The kernel that adds adapters within products of ``x`` [M, K], or None where there is none for these."""
    ranks = [] if adapters is None else [b.shape[1] for b in adapters.b]
    if not x.shape[0] or not can_launch(x) or any(rank % 16 for rank in ranks):
        return None
    if adapters is not None and adapters.a.dtype != x.dtype:
        return None
    if mask is not None and (mask.dtype != x.dtype or not mask.is_contiguous()):
        return None
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if dense:
        worth = adapters is not None or len(dense) > 1  # else torch's product is as good
        return multiply_dense if worth and len(dense) == len(weights) and takes_dense(x, dense) else None
    multiply = product_kernel(x, [weight for weight in weights if isinstance(weight, NF4Weight)])
    return multiply if mask is None or multiply is multiply_tiles else None


def _together(weights: Sequence[Weight], adapters: StackedAdapters | None) -> bool:
    """Whether one launch can take all of these, each of which some launch takes."""
    packed = [weight for weight in weights if isinstance(weight, NF4Weight)]
    alike = launch_together(packed) if packed else True
    return alike and (adapters is None or len({b.shape[1] for b in adapters.b}) == 1)


def _one_by_one(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: StackedAdapters | None,
    mask: torch.Tensor | None,
    fast: bool,
) -> list[torch.Tensor]:
    """The formula, a product at a time."""
    products = [
        partial(nf4_linear, x, weight, fast=fast) if isinstance(weight, NF4Weight) else partial(linear, x, weight)
        for weight in weights
    ]
    outputs = side_by_side(products, x.device)
    if adapters is None:
        return outputs
    first = 0
    for i, (b, scale) in enumerate(zip(adapters.b, adapters.scales, strict=True)):
        t = x @ adapters.a[first : first + b.shape[1]].to(x.dtype).T
        if mask is not None:
            t = (t.view(len(t), mask.shape[1], -1) * mask[:, :, None].to(t.dtype)).flatten(1)
        outputs[i] = outputs[i] + t @ b.to(x.dtype).T * scale
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
            STEP=STEP // (batch // 16), num_warps=4, num_stages=stages, **early_launch(early),
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
