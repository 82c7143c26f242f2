"""Attention over pages: of one token a sequence, and of several.

The formula is that of :mod:`unsloth.kernels.paged_attention`; the query at position p sees keys up to p, of the newest
``window`` if there is one. For several tokens a sequence is gathered out of its pages; where nothing came before, and a
kernel for packed documents does it, nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.dispatch import can_launch
from unsloth.kernels.paged_attention import paged_attention
from unsloth.kernels.varlen_attention import choose_backend, varlen_attention


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a flat batch.

    Attributes:
        first: Place of the first of them in the batch.
        count: How many.
        start: Position of the first in the sequence.
        pages: Of the sequence, int64, as far as position ``start + count - 1``.
    """

    first: int
    count: int
    start: int
    pages: torch.Tensor


def token_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
    fast: bool = True,
) -> torch.Tensor:
    """Attention of the newest token of every sequence.

    Args:
        q: (B, H, D).
        k_cache: (N, P, G, D).
        v_cache: Likewise.
        table: (B, columns) int32, pages of each sequence.
        lengths: (B,) int32, tokens in the cache, the newest included; 0 for none, whose result means nothing.
        scale: Of the scores.
        window: Tokens that a query sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
        fast: False takes the reference of the kernel, one sequence at a time.

    Returns:
        (B, H, D).
    """
    if can_launch(q, k_cache) or not fast:
        return paged_attention(
            q, k_cache, v_cache, table, lengths, scale=scale, window=window, softcap=softcap, fast=fast
        )
    size = k_cache.shape[1]
    pages = table[:, : max(-(-int(lengths.max()) // size), 1)].long()
    position = torch.arange(pages.shape[1] * size, device=q.device)
    visible = position < lengths.clamp(min=1)[:, None]
    # what is beyond a sequence's end may be anything, and zero times NaN is NaN
    beyond = ~visible[:, :, None, None]
    k, v = (
        _gather(c, pages).flatten(1, 2).to(q.dtype).masked_fill_(beyond, 0).transpose(1, 2) for c in (k_cache, v_cache)
    )
    if window:
        visible = visible & (position >= lengths[:, None] - window)
    return _attend(q[:, :, None], k, v, visible[:, None, None], scale, softcap)[:, :, 0]


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    spans: list[Span],
    ends: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
    fast: bool = True,
) -> torch.Tensor:
    """Attention of the tokens of ``spans``.

    Args:
        q: (T, H, D).
        k: (T, G, D), in the cache already.
        v: Likewise.
        k_cache: (N, P, G, D).
        v_cache: Likewise.
        spans: Which tokens are whose; together all T.
        ends: (spans + 1,) int32, places in the batch where they begin and end.
        scale: Of the scores.
        window: Tokens that a query sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
        fast: Whether kernels may be used.

    Returns:
        (T, H, D).
    """
    if fast and q.is_cuda and all(span.start == 0 for span in spans):
        backend = choose_backend(q, window=window, softcap=softcap)
        if backend != "reference":
            longest = max(span.count for span in spans)
            return varlen_attention(
                q, k, v, ends, longest=longest, scale=scale, window=window, softcap=softcap, backend=backend
            )
    out = torch.empty_like(q)
    for span in spans:
        part = slice(span.first, span.first + span.count)
        length = span.start + span.count
        keys, values = (_gather(c, span.pages).flatten(0, 1)[:length].to(q.dtype) for c in (k_cache, v_cache))
        out[part] = _one(q[part], keys, values, scale, window, softcap)
    return out


def _gather(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(..., P, G, D) of these pages; torch cannot index eight-bit floats everywhere."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8)[pages].view(cache.dtype)
    return cache[pages]


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
    """(T, H, D) for the last T tokens of a sequence with keys and values (N, G, D)."""
    count, length = q.shape[0], k.shape[0]
    query = torch.arange(length - count, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    visible = key <= query
    if window:
        visible = visible & (key > query - window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _attend(q, k, v, visible, scale, softcap)[0].transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """(B, H, T, D) for q of this shape, k and v (B, G, N, D), and a mask that spreads to (B, H, T, N)."""
    if not softcap:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * scale / softcap)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype) @ v
