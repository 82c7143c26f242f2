"""Attention of one new token a sequence over keys and values kept in pages.

Shapes: B sequences, H query heads in groups of G over K key heads, D head dimension, N tokens in a sequence, pages of P
tokens. With the sequence's keys and values k_n, v_n (n < N_b) found through its page table::

    s_n = softcap tanh(scale q.k_n / softcap)      (no softcap: scale q.k_n)
    n is visible if n >= N_b - window              (no window: always)
    o   = sum_n exp(s_n) v_n / (exp(sink_h) + sum_n exp(s_n))      (no sink: without its term)

The new token's own key and value are in the cache already, as n = N_b - 1. A sequence of no tokens gives zeros. Lengths
and page addresses are read on the device, so a captured graph serves growing sequences and moved pages. The tokens of
a sequence are shared among programs whose partial sums a second kernel joins (Dao et al. 2023, flash-decoding; paging
after Kwon et al. 2023, arXiv:2309.06180; sinks after Xiao et al. 2023, arXiv:2309.17453).

Bytes: every visible key and value once: 2 N K D elements a sequence.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels import dispatch
from unsloth.kernels.rounding import must_round, nearest


@triton.jit
def load_tokens(
    k_ptr, v_ptr, table_row, n, stop, d, D, head, page_size, page_stride, token_stride, head_stride, v_page_stride,
    v_token_stride, v_head_stride,
):  # fmt: skip
    """Keys (D, tokens) and values (tokens, D) of one head for tokens ``n`` of a sequence, zeros from ``stop`` on."""
    page = tl.load(table_row + n // page_size, mask=n < stop, other=0).to(tl.int64)
    within = n % page_size
    k_at = page * page_stride + within * token_stride + head * head_stride
    k = tl.load(k_ptr + k_at[None, :] + d[:, None], mask=(n[None, :] < stop) & (d[:, None] < D), other=0.0)
    v_at = page * v_page_stride + within * v_token_stride + head * v_head_stride
    v = tl.load(v_ptr + v_at[:, None] + d[None, :], mask=(n[:, None] < stop) & (d[None, :] < D), other=0.0)
    return k, v


@triton.jit
def take_tokens(s, v, top, total, acc):
    """One step of a softmax that goes on: scores (rows, tokens) and values; largest score, sum and output so far."""
    new_top = tl.maximum(top, tl.max(s, axis=1))
    shrink = tl.exp(top - new_top)
    p = tl.exp(s - new_top[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride", "table_columns", "window"])
def paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lengths_ptr,
    part_ptr,
    m_ptr,
    l_ptr,
    q_stride_b,
    q_stride_h,
    page_stride,
    token_stride,
    head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    table_stride,
    table_columns,
    scale,
    softcap,
    window,
    G,
    D,
    page_size: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
    ROUND: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (sequence, key head, share of the tokens): all query heads of the group together.

    With WHOLE there is one share, and ``part_ptr`` is the result itself, contiguous (B, H, D).
    """
    if EARLY:
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    wanted = tl.load(lengths_ptr + b)
    length = tl.minimum(wanted, table_columns * page_size)  # nothing is read beyond the table's row
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, length)
    q_at = q_ptr + b * q_stride_b + (head * G + g[:, None]) * q_stride_h + d[None, :]
    q = tl.load(q_at, mask=(g[:, None] < G) & (d[None, :] < D), other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_G], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k, v = load_tokens(
            k_ptr, v_ptr, table_ptr + b * table_stride, n, stop, d, D, head, page_size, page_stride, token_stride,
            head_stride, v_page_stride, v_token_stride, v_head_stride,
        )  # fmt: skip
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        k, v = k.to(q.dtype), v.to(q.dtype)  # a cache may hold eight-bit floats
        s = tl.dot(q, k, input_precision="ieee") * scale
        if CAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
        visible = n < stop
        if WINDOW:
            visible = visible & (n >= length - window)
        s = tl.where(visible[None, :], s, float("-inf"))
        m, total, acc = take_tokens(s, v, m, total, acc)
    total = tl.where(wanted > length, float("nan"), total)
    at = (b * tl.num_programs(1) * G + head * G + g) * splits + split
    live = (g[:, None] < G) & (d[None, :] < D)
    if EARLY:
        gdc_launch_dependents()
    if WHOLE:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(part_ptr + at[:, None] * D + d[None, :], nearest(out, ROUND), mask=live)
    else:
        tl.store(m_ptr + at, m, mask=g < G)
        tl.store(l_ptr + at, total, mask=g < G)
        tl.store(part_ptr + at[:, None] * D + d[None, :], acc, mask=live)


@triton.jit(do_not_specialize=["splits"])
def paged_attention_join_kernel(
    part_ptr,
    m_ptr,
    l_ptr,
    sinks_ptr,
    out_ptr,
    H,
    D,
    splits,
    SINKS: tl.constexpr,
    ROUND: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (sequence, query head): joins the shares' sums, each relative to its own maximum."""
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    m = tl.load(m_ptr + row * splits + s, mask=s < splits, other=-1.0e30)
    total = tl.load(l_ptr + row * splits + s, mask=s < splits, other=0.0)
    top = tl.max(m, axis=0)
    if SINKS:
        sink = tl.load(sinks_ptr + row % H).to(tl.float32)
        top = tl.maximum(top, sink)
    weight = tl.exp(m - top)
    denominator = tl.sum(total * weight, axis=0)
    empty = denominator == 0.0
    if SINKS:
        denominator += tl.exp(sink - top)
    at = (row * splits + s[:, None]) * D + d[None, :]
    parts = tl.load(part_ptr + at, mask=(s[:, None] < splits) & (d[None, :] < D), other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0) / tl.where(empty, 1.0, denominator)
    tl.store(out_ptr + row * D + d, nearest(out, ROUND), mask=d < D)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    splits: int | None = None,
    fast: bool = True,
) -> torch.Tensor:
    """Attention of one query a sequence over its cached keys and values; no gradient.

    Args:
        q: (B, H, D).
        k_cache: (pages, P, K, D), unit stride along D; K divides H. Of q's dtype, or E4M3.
        v_cache: Like ``k_cache``.
        page_table: (B, most pages of a sequence) int32 or int64; entries beyond a sequence's length are not read.
        lengths: (B,) int32 or int64 tokens in the cache, the new one included. More than the table's row has room for
            yields NaN where kernels run, and an error from the plain computation.
        scale: Of the scores; None for D ** -0.5.
        window: How many of the newest tokens are visible; 0 for all.
        softcap: Bound of the scores; 0 for none.
        sinks: (H,) logits that take part in the softmax without a value, or None.
        splits: Programs that share a sequence's tokens; None for a choice by batch and table width (which a captured
            graph keeps).
        fast: False for the plain computation, which waits for the device.

    Returns:
        (B, H, D).
    """
    _check(q, k_cache, v_cache, page_table, lengths, sinks, window, softcap)
    batch, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    scale = dim**-0.5 if scale is None else scale
    floats = [q, sinks] if k_cache.dtype == torch.float8_e4m3fn else [q, k_cache, v_cache, sinks]
    present = [tensor for tensor in floats if tensor is not None]
    aligned = k_cache.stride(3) == 1 and v_cache.stride(3) == 1 and dim <= 256
    if not fast or not aligned or not dispatch.can_launch(*present):
        return _one_by_one(q, k_cache, v_cache, page_table, lengths, scale, window, softcap, sinks)
    q = q.detach() if q.stride(2) == 1 else q.detach().contiguous()
    out = torch.empty(batch, heads, dim, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    lengths, sinks = lengths.contiguous(), None if sinks is None else sinks.contiguous()
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = block_tokens(block_d, k_cache)
    if splits is None:
        tiles = triton.cdiv(page_table.shape[1] * k_cache.shape[1], block_n)
        splits = max(1, min(tiles, 64, 3 * dispatch.processor_count(q.device) // (batch * kv_heads)))
    whole = splits == 1 and sinks is None
    parts = out if whole else torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=q.device)
    shares = 8 if splits <= 8 else max(64, triton.next_power_of_2(splits))  # few sizes, few compilations
    early = dispatch.overlaps_launches(q.device)
    late = dispatch.early_launch(early)
    with dispatch.launch_on(q):
        paged_attention_kernel[(batch, kv_heads, splits)](
            q, k_cache, v_cache, page_table, lengths, parts, tops, totals, q.stride(0), q.stride(1),
            *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0), page_table.shape[1], scale,
            softcap, window, heads // kv_heads, dim, k_cache.shape[1], WHOLE=whole, EARLY=early,
            ROUND=must_round(out.dtype), CAP=softcap > 0, WINDOW=window > 0, UPCAST=dispatch.interpreting(),
            BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
            BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=2, **late,
        )  # fmt: skip
        if not whole:
            paged_attention_join_kernel[(batch * heads,)](
                parts, tops, totals, parts if sinks is None else sinks, out, heads, dim, splits,
                SINKS=sinks is not None, ROUND=must_round(out.dtype), EARLY=early, BLOCK_S=shares,
                BLOCK_D=block_d, **late,
            )  # fmt: skip
    return out


def block_tokens(block_d: int, cache: torch.Tensor) -> int:
    """Tokens of a tile; fewer where a program has little shared memory."""
    if block_d > 128:
        return 32
    large = not dispatch.interpreting() and dispatch.capability(cache.device) in ((8, 0), (9, 0), (10, 0))
    return 128 if large and cache.dtype.itemsize <= 2 else 64


paged_attention_reference = partial(paged_attention, fast=False)


def _one_by_one(q, k_cache, v_cache, page_table, lengths, scale, window, softcap, sinks) -> torch.Tensor:
    """The formula, one sequence at a time, in float32 at least; arguments as for :func:`paged_attention`."""
    groups = q.shape[1] // k_cache.shape[2]
    dtype = dispatch.compute_dtype(q.dtype)
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        if length > page_table.shape[1] * k_cache.shape[1]:
            do = f"The table has room for {page_table.shape[1]} pages of {k_cache.shape[1]} a sequence."
            raise ConfigError("A sequence is longer than its row of the page table", got=length, do=do)
        first = max(0, length - window) if window else 0
        pages = page_table[b, : -(-length // k_cache.shape[1])].long()
        k, v = (c[pages].flatten(0, 1)[first:length].to(dtype) for c in (k_cache, v_cache))
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        scores = torch.einsum("hd,nhd->hn", q[b].to(dtype), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None]], dim=1)
        p = torch.softmax(scores, dim=1)[:, : length - first]
        out[b] = torch.einsum("hn,nhd->hd", p, v).to(q.dtype)
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    window: int,
    softcap: float,
) -> None:
    shapes_fit = q.dim() == 3 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    if not shapes_fit or k_cache.shape[3] != q.shape[2] or q.shape[1] % k_cache.shape[2]:
        raise ConfigError(
            "Queries and cache do not fit",
            got=(tuple(q.shape), tuple(k_cache.shape), tuple(v_cache.shape)),
            do="Pass q (B, H, D) and caches (pages, P, K, D) with K dividing H.",
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ConfigError(
            "Queries and cache differ in dtype", got=(q.dtype, k_cache.dtype, v_cache.dtype), do="Cast the queries."
        )
    dispatch.check_integers("paged_attention", page_table=page_table, lengths=lengths)
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    dispatch.check_device("paged_attention", q.device, **caches, page_table=page_table, lengths=lengths, sinks=sinks)
    if page_table.dim() != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ConfigError(
            "One table row and one length a sequence are needed",
            got=(tuple(page_table.shape), tuple(lengths.shape)),
            do=f"The batch has {q.shape[0]} sequences.",
        )
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        do = f"Pass floats ({q.shape[1]},)."
        raise ConfigError("One sink a query head is needed", got=(sinks.dtype, tuple(sinks.shape)), do=do)
    if window < 0 or softcap < 0:
        raise ConfigError("Window and softcap must not be negative", got=(window, softcap), do="Use 0 for none.")


def compile_examples(float_dtype: str) -> list[tuple]:
    """Signatures for the cross-compilation test: plain, and everything switched on at head dimension 256."""
    strides = ("q_stride_b", "q_stride_h", "page_stride", "token_stride", "head_stride", "v_page_stride")
    integers = (
        *strides,
        "v_token_stride",
        "v_head_stride",
        "table_stride",
        "table_columns",
        "window",
        "G",
        "D",
        "H",
        "splits",
    )
    signature = dict.fromkeys(integers, "i32") | {"scale": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "sinks_ptr", "out_ptr"), f"*{float_dtype}")
    signature |= dict.fromkeys(("part_ptr", "m_ptr", "l_ptr"), "*fp32")
    signature |= {"table_ptr": "*i32", "lengths_ptr": "*i32"}
    examples: list[tuple] = []
    many = 64 if float_dtype == "fp16" else 128  # as for the cards that such numbers stand for
    for on, n, d in ((False, many, 128), (True, 32, 256)):
        sizes = {"page_size": 16, "BLOCK_G": 16, "BLOCK_N": n, "BLOCK_D": d, "ROUND": False, "EARLY": False}
        shape = {"WHOLE": on, "CAP": on, "WINDOW": on, "UPCAST": False, **sizes}
        types = {**signature, "part_ptr": f"*{float_dtype}"} if on else signature
        examples.append((paged_attention_kernel, types, shape))
        join = {"SINKS": on, "ROUND": False, "EARLY": False, "BLOCK_S": 64 if on else 8, "BLOCK_D": d}
        examples.append((paged_attention_join_kernel, signature, join))
    return examples
