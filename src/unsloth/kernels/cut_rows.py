"""For every row of logits, the bound below which top-k, top-p and min-p leave tokens out.

With z = a / T and p = softmax(z) of a row, T its temperature (taken as 1 where it is 0)::

    c_k = the k-th largest z                                            (k = 0: minus infinity)
    c_p = the largest z_v with sum over z_w >= z_v, z_w >= c_k of p_w >= top_p * sum over z_w >= c_k of p_w
    bound = max(c_k, c_p, max(z) + log(min_p))

which is what transformers' processors leave, in their order, but that of equal logits all are kept. Sorting a row of
128,000 logits costs more than a model's layer; here each of the two values is found by bisection over the 32 bits of
its float. A first pass over the row counts, at a few distances below the largest logit, how many are above and what
they weigh; where a few thousand suffice, a second one sets these apart, and the bisection reads them alone. Bytes: the
logits once, and twice from the cache (64 times where the tail is so heavy that too many would be set apart).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import (
    can_launch,
    check_device,
    check_integers,
    check_shape,
    check_tensors,
    launch_on,
)

_BLOCK = 4096
_MOST = 4096  # logits that are set apart


def cut_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """The bounds.

    Args:
        logits: (B, V), adjacent columns.
        temperature: (B,) float32; 0 counts as 1.
        top_k: (B,) int32; 0 keeps all.
        top_p: (B,) float32, above 0; 1 keeps all.
        min_p: (B,) float32; 0 keeps all.
        fast: False takes the plain-torch reference, which sorts.

    Returns:
        (B,) float32, on the scale of ``logits * (1 / temperature)``, which rounds as in
        :mod:`unsloth.kernels.sample_rows`.
    """
    check_tensors("cut_rows", logits=logits, temperature=temperature, top_p=top_p, min_p=min_p)
    check_device("cut_rows", logits.device, top_k=top_k)
    check_integers("cut_rows", top_k=top_k)
    limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if logits.dim() != 2 or not logits.shape[1]:
        raise ConfigError("cut_rows: logits must be a matrix", got=tuple(logits.shape), do="Pass (B, V).")
    for name, limit in limits.items():
        check_shape("cut_rows", name, limit, (len(logits),))
    temperature, top_k, top_p, min_p = (limit.contiguous() for limit in limits.values())
    rows, size = logits.shape
    if not (fast and rows and logits.stride(1) == 1 and can_launch(logits, temperature, top_p, min_p)):
        return cut_rows_reference(logits, temperature, top_k, top_p, min_p)
    bound = torch.empty(rows, dtype=torch.float32, device=logits.device)
    apart = torch.empty(rows, _MOST, dtype=torch.float32, device=logits.device)
    with launch_on(logits):
        cut_rows_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, bound, apart, size, logits.stride(0), MOST=_MOST,
            BLOCK=min(_BLOCK, triton.next_power_of_2(size)), num_warps=8,
        )  # fmt: skip
    return bound


def cut_rows_reference(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The formula in plain torch."""
    z = logits.float() * (1 / torch.where(temperature == 0, 1.0, temperature))[:, None]
    size = z.shape[1]
    ordered = z.sort(-1, descending=True).values
    k = torch.where(top_k > 0, top_k.clamp(max=size), size).long()[:, None]
    ordered = ordered.masked_fill(ordered < ordered.gather(1, k - 1), float("-inf"))
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)  # sums of float32 may reach 1 early
    kept = (inside & (ordered > float("-inf"))).sum(-1, keepdim=True)
    bound = ordered.gather(1, (kept - 1).clamp(min=0))[:, 0]
    return torch.maximum(bound, ordered[:, 0] + torch.log(min_p))


@triton.jit
def as_float(order):
    """The float32 at place ``order`` (uint32) of all floats in rising order; minus infinity below its place."""
    bits = tl.where(order >= 0x80000000, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    value = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(order < 0x007FFFFF, float("-inf"), value)


@triton.jit
def scaled(at, column, size, cold):
    """Logits over the temperature, minus infinity beyond the row."""
    return tl.load(at + column, column < size, other=float("-inf")).to(tl.float32) * cold


@triton.jit
def search(at, size, cold, top, total, k, share, BLOCK: tl.constexpr):
    """max(c_k, c_p) by bisection; ``total`` is the sum of exp(z - top) over the whole row, and k = 0 keeps all."""
    lane = tl.arange(0, BLOCK)
    lowest = tl.full([], float("-inf"), tl.float32)
    if k > 0:
        order = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(0, 32):
            tried = order | bit
            bit = bit >> 1
            least = as_float(tried)
            count = tl.full([], 0, tl.int32)
            for start in range(0, size, BLOCK):
                column = start + lane
                count += tl.sum(((scaled(at, column, size, cold) >= least) & (column < size)).to(tl.int32), 0)
            order = tl.where(count >= k, tried, order)
        lowest = as_float(order)
    if share < 1.0:
        wanted = total
        if k > 0:
            wanted = tl.full([], 0.0, tl.float32)
            for start in range(0, size, BLOCK):
                z = scaled(at, start + lane, size, cold)
                wanted += tl.sum(tl.where(z >= lowest, tl.exp(z - top), 0.0), 0)
        wanted = wanted * share
        order = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(0, 32):
            tried = order | bit
            bit = bit >> 1
            least = tl.maximum(as_float(tried), lowest)
            mass = tl.full([], 0.0, tl.float32)
            for start in range(0, size, BLOCK):
                z = scaled(at, start + lane, size, cold)
                mass += tl.sum(tl.where(z >= least, tl.exp(z - top), 0.0), 0)
            order = tl.where((mass >= wanted) & (as_float(tried) <= top), tried, order)
        lowest = tl.maximum(lowest, as_float(order))
    return lowest


@triton.jit
def cut_rows_kernel(
    logits, temperature, top_k, top_p, min_p, bound, apart, size, stride, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    cold = 1.0 / tl.where(heat == 0.0, 1.0, heat)
    k = tl.load(top_k + row)
    k = tl.where(k < size, k, 0)
    share = tl.load(top_p + row)
    lowest_share = tl.load(min_p + row)
    at = logits + row * stride
    apart += row * MOST
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        most = tl.maximum(most, scaled(at, start + lane, size, cold))
    top = tl.max(most, 0)
    lowest = tl.full([], float("-inf"), tl.float32)
    if (k > 0) | (share < 1.0):
        total = tl.zeros([BLOCK], tl.float32)
        weight0, weight1, weight2 = total, total, total
        count0 = tl.zeros([BLOCK], tl.int32)
        count1, count2 = count0, count0
        for start in tl.range(0, size, BLOCK, num_stages=3):
            column = start + lane
            z = scaled(at, column, size, cold)
            e = tl.exp(z - top)
            total += e
            above0 = (z >= top - 4.0) & (column < size)
            above1 = (z >= top - 8.0) & (column < size)
            above2 = (z >= top - 14.0) & (column < size)
            weight0 += tl.where(above0, e, 0.0)
            weight1 += tl.where(above1, e, 0.0)
            weight2 += tl.where(above2, e, 0.0)
            count0 += above0.to(tl.int32)
            count1 += above1.to(tl.int32)
            count2 += above2.to(tl.int32)
        everything = tl.sum(total, 0)
        # by k alone where there is one; a little more than the share, since sums in another order round differently
        enough = tl.where(k > 0, 0.0, everything * share * 1.0001)
        n0, n1, n2 = tl.sum(count0, 0), tl.sum(count1, 0), tl.sum(count2, 0)
        fits0 = (n0 >= k) & (tl.sum(weight0, 0) >= enough)
        fits1 = (n1 >= k) & (tl.sum(weight1, 0) >= enough)
        fits2 = (n2 >= k) & (tl.sum(weight2, 0) >= enough)
        gap = tl.where(fits0, 4.0, tl.where(fits1, 8.0, 14.0))
        count = tl.where(fits0, n0, tl.where(fits1, n1, n2))
        if (fits0 | fits1 | fits2) & (count <= MOST):
            place = tl.full([], 0, tl.int32)
            for start in tl.range(0, size, BLOCK, num_stages=3):
                column = start + lane
                z = scaled(at, column, size, cold)
                above = (z >= top - gap) & (column < size)
                at_place = place + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(apart + at_place, z, above)
                place += tl.sum(above.to(tl.int32), 0)
            tl.debug_barrier()  # all of it is written before any of it is read
            lowest = search(apart, count, 1.0, top, everything, k, share, BLOCK)
        else:
            lowest = search(at, size, cold, top, everything, k, share, BLOCK)
    if lowest_share > 0.0:
        lowest = tl.maximum(lowest, top + tl.log(lowest_share))
    tl.store(bound + row, lowest)


def compile_examples(float_dtype: str) -> list[tuple]:
    """The kernel with the argument types and options it is launched with, for compilation without a GPU."""
    signature = {"logits": f"*{float_dtype}", "top_k": "*i32", "size": "i32", "stride": "i32"}
    signature |= dict.fromkeys(("temperature", "top_p", "min_p", "bound", "apart"), "*fp32")
    return [(cut_rows_kernel, signature, {"MOST": _MOST, "BLOCK": _BLOCK}, {"num_warps": 8})]
