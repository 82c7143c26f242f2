"""Causal attention for transformers' attention interface that never builds a T x T mask for packed documents.

Registered under the name :data:`NAME` with ``transformers.AttentionInterface`` and ``AttentionMaskInterface``; a
model takes part in it only if it is set to that name. Where positions start again, a document starts, as transformers
has it for packed batches. Where they go back to a position above 0, a branch starts: it goes on from that position of
its document's first part, of which it sees what comes before, and of the rest of the document nothing. Two answers to
one prompt are so computed with one copy of it. Documents are attended to one by one inside a kernel
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

from unsloth.kernels.varlen_attention import Branches, Keys, choose_backend, varlen_attention

NAME = "unsloth"
_KERNELS = ("flash_attn", "torch")
_ATTRIBUTE = "unsloth_documents"


@dataclass
class Documents:
    """Where the documents of a batch are.

    Attributes:
        version: Of the positions they were read off.
        cu_seqlens: (N + 1,) int32, bounds in the flattened batch of documents, first parts of documents and branches.
        longest: Tokens of the longest.
        single: Whether every row is one document.
        number: (B, T), which of those each token is in.
        branches: What they see, if some are branches.
    """

    version: int
    cu_seqlens: torch.Tensor
    longest: int
    single: bool
    number: torch.Tensor
    branches: Branches | None = None


def documents_of(position_ids: torch.Tensor, batch: int) -> Documents:
    """The documents in ``position_ids`` (B or 1, T): one starts wherever a position is not the one before plus one.

    See the module for branches. Found once a batch, which makes a GPU wait once; all layers find the result on the
    tensor itself, but in torch's inference mode, whose tensors do not tell whether they were changed.
    """
    lasts = not torch.is_inference_mode_enabled() and not position_ids.is_inference()
    known = getattr(position_ids, _ATTRIBUTE, None) if lasts else None
    if known is not None and known.version == position_ids._version and known.number.shape[0] == batch:
        return known
    positions = position_ids.expand(batch, -1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    first = starts.flatten().nonzero().flatten()
    bounds = torch.cat([first, first.new_tensor([positions.numel()])])
    cu_seqlens = bounds.to(torch.int32)
    begins = torch.where(first % positions.shape[1] == 0, 0, positions.flatten()[first])
    longest, latest = torch.stack([cu_seqlens.diff().max(), begins.max()]).tolist()
    found = Documents(
        version=position_ids._version if lasts else 0,
        cu_seqlens=cu_seqlens,
        longest=longest,
        single=len(first) == batch,
        number=starts.flatten().cumsum(0).view_as(positions),
        branches=_branches(bounds.tolist(), begins.tolist(), cu_seqlens) if latest > 0 else None,
    )
    if lasts:
        setattr(position_ids, _ATTRIBUTE, found)
    return found


def _branches(bounds: list[int], begins: list[int], cu_seqlens: torch.Tensor) -> Branches | None:
    """See :class:`Branches`; None if no part is one.

    Args:
        bounds: Of the parts.
        begins: Position that each begins at, 0 for the first of a row.
        cu_seqlens: The bounds as a tensor.
    """
    root = 0  # the first part of the document at hand
    gathered, ends = [], [0]
    branched = False
    for part, begin in enumerate(begins):
        if 0 < begin <= bounds[root + 1] - bounds[root]:
            gathered.append(torch.arange(bounds[root], bounds[root] + begin))
            branched = True
        else:
            root, begin = part, 0
        own = torch.arange(bounds[part], bounds[part + 1])
        gathered.append(own)
        ends.append(ends[-1] + begin + len(own))
    if not branched:
        return None
    most = max(last - first for first, last in zip(ends[:-1], ends[1:], strict=True))
    keys = Keys(torch.tensor(ends, dtype=torch.int32).to(cu_seqlens.device), most)
    return Branches(keys, torch.cat(gathered).to(cu_seqlens.device))


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
    branches = documents.branches
    longest = documents.longest if branches is None else branches.keys.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else 0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if not dropout and choose_backend(q, window=window) in _KERNELS:
        if branches is not None:
            k, v = k[branches.gathered], v[branches.gathered]
        keys = None if branches is None else branches.keys
        cu_seqlens, longest = documents.cu_seqlens, documents.longest
        y = varlen_attention(q, k, v, cu_seqlens, keys=keys, longest=longest, scale=scale, window=window)
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
    if documents.branches is not None:
        visible = documents.branches.mask(documents.cu_seqlens, query.shape[0], window)
    elif not documents.single or window:
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
