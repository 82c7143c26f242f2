"""Rotary embedding of queries and keys, and keys and values written into their pages, in one launch.

For the one new token of every sequence, at position p and place s (page times page size, and the place in the page)::

    q = R_p q        k_cache[s] = R_p k        v_cache[s] = v

R is the rotation of :mod:`unsloth.kernels.rope` with the pairs (i, i + D/2), over the whole head. Bytes: q twice, k and
v twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.rope import rope_reference
from unsloth.kernels.rounding import must_round, nearest

_LARGEST_E4M3 = 448.0


def rope_to_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    fast: bool = True,
) -> None:
    """Rotate ``q`` where it is, and fill the caches; no gradient.

    Args:
        q: (T, H, D), adjacent along D; overwritten.
        k: (T, K, D), likewise; not changed.
        v: Like ``k``.
        cos: (positions, D/2) table.
        sin: Likewise.
        positions: (T,) int32 or int64 rows of the tables.
        places: (T,) int32 or int64; the kernel stores no token whose place is not in the caches.
        k_cache: (pages, P, K, D), contiguous; of q's dtype, or E4M3.
        v_cache: Likewise.
        fast: False takes the plain-torch reference.
    """
    dispatch.check_tensors("rope_to_pages", q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    dispatch.check_device("rope_to_pages", q.device, positions=positions, places=places)
    dispatch.check_integers("rope_to_pages", positions=positions, places=places)
    if any(x.dim() != 3 or len(x) != len(q) for x in (q, k, v)) or cos.dim() != 2 or k_cache.dim() != 4:
        got = [tuple(x.shape) for x in (q, k, v, cos, k_cache)]
        do = "Pass q, k, v (T, heads, D), tables (P, D/2) and caches (pages, P, K, D)."
        raise ConfigError("rope_to_pages: shapes do not fit", got=got, do=do)
    for name, numbers in (("positions", positions), ("places", places)):
        dispatch.check_shape("rope_to_pages", name, numbers, (len(q),))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        dispatch.check_shape("rope_to_pages", name, cache, (*k_cache.shape[:2], *k.shape[1:]))
        if cache.dtype not in (q.dtype, torch.float8_e4m3fn):
            do = f"Pass a cache of {q.dtype} or {torch.float8_e4m3fn}."
            raise ConfigError(f"rope_to_pages: {name} has another dtype", got=cache.dtype, do=do)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        do = "Cast keys and values to the queries' dtype."
        raise ConfigError("rope_to_pages: dtypes differ", got=(q.dtype, k.dtype, v.dtype), do=do)
    positions, places = positions.contiguous(), places.contiguous()
    tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[2] != dim or cos.shape != sin.shape or cos.shape[1] * 2 != dim:
        found = (tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(cos.shape))
        raise ConfigError(
            "rope_to_pages: shapes do not fit", got=found, do="Pass q, k, v (T, heads, D), tables (P, D/2)."
        )
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ConfigError("rope_to_pages: caches must be contiguous", got=(k_cache.stride(), v_cache.stride()))
    adjacent = all(x.stride(2) == 1 for x in (q, k, v)) and cos.stride(1) == 1 and cos.stride() == sin.stride()
    if not (fast and adjacent and tokens and dispatch.can_launch(q, k, v) and dispatch.can_launch(cos, sin)):
        rope_to_pages_reference(q, k, v, cos, sin, positions, places, k_cache, v_cache)
        return
    half, early = dim // 2, dispatch.overlaps_launches(q.device)
    with dispatch.launch_on(q):
        rope_to_pages_kernel[(tokens, triton.cdiv(heads, 8) + triton.cdiv(k.shape[1], 8))](
            q, k, v, cos, sin, positions, places, k_cache, v_cache, heads, k.shape[1], half,
            k_cache.shape[0] * k_cache.shape[1], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0),
            EIGHT_BITS=k_cache.dtype.itemsize == 1, ROUND=must_round(q.dtype), EARLY=early, HEADS=8,
            BLOCK=triton.next_power_of_2(half), num_warps=4, **dispatch.early_launch(early),
        )  # fmt: skip


def rope_to_pages_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """The formula in plain torch."""
    tables = cos[positions.long()][:, None], sin[positions.long()][:, None]  # each token a batch of one
    turned_q, turned_k = (rope_reference(x[:, :, None], *tables, q.shape[2])[:, :, 0] for x in (q, k))
    q.copy_(turned_q)
    write_pages(k_cache, places.long(), turned_k)
    write_pages(v_cache, places.long(), v)


def write_pages(cache: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> None:
    """Put rows (T, K, D) at their int64 places in a cache (pages, P, K, D); E4M3 saturates, having no infinity."""
    flat = cache.view(-1, *cache.shape[2:])
    if flat.dtype.itemsize == 1:
        small = new.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(flat.dtype)
        flat.view(torch.uint8).index_copy_(0, places, small.view(torch.uint8))
    else:
        flat.index_copy_(0, places, new)


@triton.jit
def store_in_page(pointer, value, mask, EIGHT_BITS: tl.constexpr, ROUND: tl.constexpr):
    """Store float32 values, saturated where the cache has eight bits."""
    if EIGHT_BITS:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    tl.store(pointer, nearest(value, ROUND).to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rope_to_pages_kernel(
    q, k, v, cos, sin, positions, places, k_cache, v_cache, heads, key_heads, half, slots, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, table_stride, EIGHT_BITS: tl.constexpr, ROUND: tl.constexpr,
    EARLY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes eight heads of a token: of the queries, or of keys and values."""
    if EARLY:  # in this order: what is launched early may read what the kernel ahead of this one writes
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(heads, HEADS)
    i = tl.arange(0, BLOCK)[None, :]
    row = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + row * table_stride + i, i < half, other=0.0).to(tl.float32)
    s = tl.load(sin + row * table_stride + i, i < half, other=0.0).to(tl.float32)
    if group < query_groups:
        h = group * HEADS + tl.arange(0, HEADS)[:, None]
        live = (h < heads) & (i < half)
        at = q + token * q_stride_t + h * q_stride_h + i
        x1 = tl.load(at, live, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, live, other=0.0).to(tl.float32)
        tl.store(at, nearest(x1 * c - x2 * s, ROUND), mask=live)
        tl.store(at + half, nearest(x2 * c + x1 * s, ROUND), mask=live)
    else:
        h = (group - query_groups) * HEADS + tl.arange(0, HEADS)[:, None]
        place = tl.load(places + token).to(tl.int64)
        there = tl.where((place >= 0) & (place < slots), key_heads, 0)
        live = (h < there) & (i < half)
        out = (place * key_heads + h) * (2 * half) + i
        at = k + token * k_stride_t + h * k_stride_h + i
        x1 = tl.load(at, live, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, live, other=0.0).to(tl.float32)
        store_in_page(k_cache + out, x1 * c - x2 * s, live, EIGHT_BITS, ROUND)
        store_in_page(k_cache + out + half, x2 * c + x1 * s, live, EIGHT_BITS, ROUND)
        at = v + token * v_stride_t + h * v_stride_h + i
        store_in_page(v_cache + out, tl.load(at, live, other=0.0).to(tl.float32), live, EIGHT_BITS, ROUND)
        store_in_page(v_cache + out + half, tl.load(at + half, live, other=0.0).to(tl.float32), live, EIGHT_BITS, ROUND)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    names = [name for name in rope_to_pages_kernel.arg_names if not name.isupper()]
    signature = dict.fromkeys(names, "i32") | {"positions": "*i32", "places": "*i32"}
    floats = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache")
    signature |= dict.fromkeys(floats, f"*{float_dtype}")
    shape = {"EIGHT_BITS": False, "ROUND": False, "EARLY": False, "HEADS": 8, "BLOCK": 64}
    return [(rope_to_pages_kernel, signature, shape, {"num_warps": 4})]
