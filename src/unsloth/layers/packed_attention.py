"""Causal attention for transformers' attention interface that never builds a T x T mask for packed documents.

Registered under the name :data:`NAME` with ``transformers.AttentionInterface`` and ``AttentionMaskInterface``; a
model takes part in it only if it is set to that name. Where positions start again, a document starts, as transformers
has it for packed batches. Documents are then attended to one by one inside a kernel
(:mod:`unsloth.kernels.varlen_attention`); what no kernel takes falls back on torch's attention with a mask, and padded
batches and caches on transformers' own ``sdpa``. Shapes: B batch, H heads, Hk key heads, T tokens, D head
dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unsloth.kernels.varlen_attention import choose_backend, varlen_attention

NAME = "unsloth"
_KERNELS = ("flash_attn", "torch")
_ATTRIBUTE = "unsloth_documents"


@dataclass
class Documents:
    """Where the documents of a batch are.

    Attributes:
        version: Of the positions they were read off.
        cu_seqlens: (N + 1,) int32, bounds in the flattened batch.
        longest: Tokens of the longest.
        single: Whether every row is one document.
        number: (B, T), the document of each token.
    """

    version: int
    cu_seqlens: torch.Tensor
    longest: int
    single: bool
    number: torch.Tensor


def documents_of(position_ids: torch.Tensor, batch: int) -> Documents:
    """The documents in ``position_ids`` (B or 1, T): one starts wherever a position is not the one before plus one.

    Found once a batch, which makes a GPU wait once; all layers find the result on the tensor itself.
    """
    known = getattr(position_ids, _ATTRIBUTE, None)
    if known is not None and known.version == position_ids._version and known.number.shape[0] == batch:
        return known
    positions = position_ids.expand(batch, -1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    first = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([first, first.new_tensor([positions.numel()])]).to(torch.int32)
    found = Documents(
        version=position_ids._version,
        cu_seqlens=cu_seqlens,
        longest=int(cu_seqlens.diff().max()),
        single=len(first) == batch,
        number=starts.flatten().cumsum(0).view_as(positions),
    )
    setattr(position_ids, _ATTRIBUTE, found)
    return found


def mask(
    *, batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Any = None, **more: Any
) -> torch.Tensor | None:
    """What transformers asks for before the first layer: no mask for a batch without padding, cache and extra rules."""
    whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if whole and attention_mask is None and not more.get("use_vmap"):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        **more,
    )


@torch.compiler.disable
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query (B, H, T, D), key and value (B, Hk, T, D) to (B, T, H, D).

    ``attention_mask`` is what :func:`mask` gave.
    """
    tokens = query.shape[2]
    if attention_mask is not None or tokens != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if position_ids is None:
        position_ids = torch.arange(tokens, device=query.device)[None]
    documents = documents_of(position_ids, query.shape[0])
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else 0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if not dropout and choose_backend(q, window=window) in _KERNELS:
        y = varlen_attention(q, k, v, documents.cu_seqlens, longest=documents.longest, scale=scale, window=window)
        return y.unflatten(0, (query.shape[0], tokens)), None
    return masked(query, key, value, documents, scale, window, dropout).transpose(1, 2), None


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scale: float,
    window: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Torch's attention, (B, H, T, D), with a mask only if documents or a window need one (0: no window)."""
    visible = None
    if not documents.single or window:
        position = torch.arange(query.shape[2], device=query.device)
        gap = position[:, None] - position
        visible = (gap >= 0) & ((gap < window) if window else True)
        visible = visible & (documents.number[:, None, :, None] == documents.number[:, None, None, :])
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
