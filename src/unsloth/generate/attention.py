"""Attention over pages: of one token a sequence, and of several.

The formula is that of :mod:`unsloth.kernels.paged_attention`; the query at position p sees keys up to p, of the newest
``window`` if there is one. Where there is no kernel, a sequence is gathered out of its pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from unsloth.kernels.dispatch import can_launch
from unsloth.kernels.paged_attention import paged_attention
from unsloth.kernels.paged_prefill import gather_pages, paged_prefill


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a flat batch.

    Attributes:
        first: Place of the first of them in the batch.
        count: How many.
        start: Position of the first in the sequence.
        pages: Of the sequence, as far as position ``start + count - 1``.
    """

    first: int
    count: int
    start: int
    pages: list[int]


@dataclass(frozen=True)
class SpanBatch:
    """The spans of a batch, and the same on the device for the kernel.

    Attributes:
        spans: Together they hold every token once, padding aside.
        table: (rows, columns) int32, pages.
        tiles: Of :func:`unsloth.kernels.paged_prefill.make_tiles`; those without tokens are padding.
    """

    spans: list[Span]
    table: torch.Tensor
    tiles: torch.Tensor


def on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a small tensor on the device; does not wait for what the device is doing."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


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
        gather_pages(c, pages).flatten(1, 2).to(q.dtype).masked_fill_(beyond, 0).transpose(1, 2)
        for c in (k_cache, v_cache)
    )
    if window:
        visible = visible & (position >= lengths[:, None] - window)
    return _attend(q[:, :, None], k, v, visible[:, None, None], scale, softcap)[:, :, 0]


def span_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: SpanBatch,
    *,
    scale: float,
    window: int,
    softcap: float,
    fast: bool = True,
) -> torch.Tensor:
    """Attention of several tokens of every sequence, whose keys and values are in the cache.

    Args:
        q: (T, H, D).
        k_cache: (N, P, G, D).
        v_cache: Likewise.
        batch: Which tokens are whose.
        scale: Of the scores.
        window: Tokens that a query sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
        fast: Whether kernels may be used.

    Returns:
        (T, H, D).
    """
    if fast and can_launch(q):
        return paged_prefill(q, k_cache, v_cache, batch.table, batch.tiles, scale=scale, window=window, softcap=softcap)
    out = torch.empty_like(q)
    for span in batch.spans:
        part = slice(span.first, span.first + span.count)
        length = span.start + span.count
        pages = torch.tensor(span.pages, device=q.device)
        keys, values = (gather_pages(c, pages).flatten(0, 1)[:length].to(q.dtype) for c in (k_cache, v_cache))
        out[part] = _one(q[part], keys, values, scale, window, softcap)
    return out


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
