"""For every row of logits, the bound below which top-k, top-p and min-p leave tokens out.

With z = a / T and p = softmax(z) of a row, T its temperature (taken as 1 where it is 0)::

    c_k = the k-th largest z                                            (k = 0: minus infinity)
    c_p = the largest z_v with sum over z_w >= z_v, z_w >= c_k of p_w >= top_p * sum over z_w >= c_k of p_w
    bound = max(c_k, c_p, max(z) + log(min_p))

which is what transformers' processors leave, in their order, but that of equal logits all are kept. Sorting a row of
128,000 logits costs more than a model's layer; here each of the two values is found by bisection over the 32 bits of
its float, one pass over the row (which stays in the cache of the card) a bit. Bytes: the logits once, and 64 times
from the cache.
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

_BLOCK = 8192


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
    if logits.dim() != 2:
        raise ConfigError("cut_rows: logits must be a matrix", got=tuple(logits.shape), do="Pass (B, V).")
    for name, limit in limits.items():
        check_shape("cut_rows", name, limit, (len(logits),))
    temperature, top_k, top_p, min_p = (limit.contiguous() for limit in limits.values())
    rows, size = logits.shape
    if not (fast and rows and logits.stride(1) == 1 and can_launch(logits, temperature, top_p, min_p)):
        return cut_rows_reference(logits, temperature, top_k, top_p, min_p)
    bound = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with launch_on(logits):
        cut_rows_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, bound, size, logits.stride(0),
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
    kept = ((before < top_p[:, None]) & (ordered > float("-inf"))).sum(-1, keepdim=True)
    bound = ordered.gather(1, (kept - 1).clamp(min=0))[:, 0]
    return torch.maximum(bound, ordered[:, 0] + torch.log(min_p))


@triton.jit
def as_float(order):
    """The float32 at place ``order`` (uint32) of all floats in rising order; minus infinity below its place."""
    bits = tl.where(order >= 0x80000000, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    value = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(order < 0x007FFFFF, float("-inf"), value)


@triton.jit
def cut_rows_kernel(logits, temperature, top_k, top_p, min_p, bound, size, stride, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    cold = 1.0 / tl.where(heat == 0.0, 1.0, heat)
    k = tl.load(top_k + row)
    share = tl.load(top_p + row)
    lowest_share = tl.load(min_p + row)
    at = logits + row * stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + lane
        z = tl.load(at + column, column < size, other=float("-inf")).to(tl.float32) * cold
        top = tl.maximum(top, tl.max(z, 0))
    lowest = tl.full([], float("-inf"), tl.float32)
    if (k > 0) & (k < size):
        order = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(0, 32):
            tried = order | bit
            bit = bit >> 1
            least = as_float(tried)
            count = tl.full([], 0, tl.int32)
            for start in range(0, size, BLOCK):
                column = start + lane
                z = tl.load(at + column, column < size, other=float("-inf")).to(tl.float32) * cold
                count += tl.sum(((z >= least) & (column < size)).to(tl.int32), 0)
            order = tl.where(count >= k, tried, order)
        lowest = as_float(order)
    if share < 1.0:
        wanted = tl.full([], 0.0, tl.float32)
        for start in range(0, size, BLOCK):
            column = start + lane
            z = tl.load(at + column, column < size, other=float("-inf")).to(tl.float32) * cold
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
                column = start + lane
                z = tl.load(at + column, column < size, other=float("-inf")).to(tl.float32) * cold
                mass += tl.sum(tl.where(z >= least, tl.exp(z - top), 0.0), 0)
            order = tl.where((mass >= wanted) & (as_float(tried) <= top), tried, order)
        lowest = tl.maximum(lowest, as_float(order))
    if lowest_share > 0.0:
        lowest = tl.maximum(lowest, top + tl.log(lowest_share))
    tl.store(bound + row, lowest)


def compile_examples(float_dtype: str) -> list[tuple]:
    """The kernel with the argument types and options it is launched with, for compilation without a GPU."""
    signature = {"logits": f"*{float_dtype}", "top_k": "*i32", "size": "i32", "stride": "i32"}
    signature |= dict.fromkeys(("temperature", "top_p", "min_p", "bound"), "*fp32")
    return [(cut_rows_kernel, signature, {"BLOCK": _BLOCK}, {"num_warps": 8})]
