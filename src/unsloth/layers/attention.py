"""Attention of a decoder block: projections, norms of the heads, rotary embedding, the cache, scores, output.

    q, k, v = x W_q, x W_k, x W_v      (one pass over x)
    q, k = R norm(q), R norm(k)        (norm where the family has one, R on layers with rotary embedding)
    y = softmax(cap(scale q k^T) + mask) v W_o

The scores are computed by whatever implementation the model is set to (``attn_implementation``), through
transformers' attention interface, with the arguments for packed batches handed on. Shapes: B batch, T tokens, H and
Hk heads of queries and of keys, D head dimension.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth.kernels.qk_norm_rope import qk_norm_rope
from unsloth.kernels.rope import rope
from unsloth.layers.fast import Fast, is_untouched
from unsloth.layers.linear import multiply, read_all
from unsloth.layers.norm import NormOptions

_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class AttentionOptions:
    """What an attention module computes.

    Attributes:
        projections: Names of the modules for q, k and v, or of the one that holds their rows in that order.
        output: Name of the output projection.
        heads: H.
        key_heads: Hk.
        head_dim: D.
        scale: Of the scores.
        window: Tokens that a query sees, itself included; None for all before it.
        softcap: Bound of the scores, or None.
        head_norms: Names of the modules that normalize every head of q and of k, or None.
        head_norm: What those compute, where it can be computed together with the rotary embedding.
        interleaved: Whether neighbouring dimensions form a pair of the rotary embedding.
        tables_in_halves: Whether its tables hold all angles, then all again; else each twice in a row.
        rotary_switch: Name of the module's attribute that says whether this layer has one; None: it has.
    """

    projections: tuple[str, ...]
    output: str
    heads: int
    key_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    head_norms: tuple[str, str] | None = None
    head_norm: NormOptions | None = None
    interleaved: bool = False
    tables_in_halves: bool = True
    rotary_switch: str | None = None


def forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward of an attention module: (B, T, K) to (B, T, K) and, from some implementations, the scores.

    transformers passes the cache of keys and values as ``past_key_values``, from 5.24 on as ``cache``. Under a name
    that is not known here it would be overlooked, and every token would see itself alone; so then, as for compiled
    code, the original forward runs.
    """
    given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **kwargs}
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, **given)
    fast: Fast = self.unsloth_fast
    name = next((name for name in _CACHE_NAMES if name in kwargs), None)
    cache = None if name is None else kwargs.pop(name)
    if any(isinstance(value, Cache) for value in kwargs.values()):
        return fast.decline(self, "a cache under a name that is not known", hidden_states, **given)
    options: AttentionOptions = fast.options
    (q, k, v), left = _project(self, options, hidden_states)
    q, k = _position(self, options, q, k, position_embeddings)
    v = v.transpose(1, 2)
    if cache is not None:
        context = {"kwargs": kwargs} if name == "cache" else {}
        k, v = cache.update(k, v, self.layer_idx, **context)
    more = {} if options.softcap is None else {"softcap": options.softcap}
    if options.window is not None:
        more["sliding_window"] = options.window
    y, scores = _interface(self)(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=options.scale,
        **more,
        **kwargs,
    )
    fast.took(but=left)
    return getattr(self, options.output)(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), scores


def _project(
    self: Any, options: AttentionOptions, x: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], str | None]:
    """(q (B, T, H, D), k, v (B, T, Hk, D)), and why the modules were called one by one, if they were."""
    modules = [getattr(self, name) for name in options.projections]
    linears = read_all(modules, x)
    left = f"projections called one by one: {linears}" if isinstance(linears, str) else None
    outputs = [module(x) for module in modules] if isinstance(linears, str) else list(multiply(linears, x))
    if len(outputs) == 1:
        rows, key_rows = options.heads * options.head_dim, options.key_heads * options.head_dim
        outputs = list(outputs[0].split((rows, key_rows, key_rows), dim=-1))
    q, k, v = (y.view(*x.shape[:-1], -1, options.head_dim) for y in outputs)
    return (q, k, v), left


def _position(
    self: Any,
    options: AttentionOptions,
    q: torch.Tensor,
    k: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the heads and rotary embedding of q (B, T, H, D) and k; returns (B, H, T, D) and (B, Hk, T, D)."""
    rotates = options.rotary_switch is None or bool(getattr(self, options.rotary_switch))
    norms = [getattr(self, name) for name in options.head_norms or ()]
    if rotates and tables is not None and options.head_norm is not None and _fuses(norms, q):
        return qk_norm_rope(
            q.transpose(1, 2),
            k.transpose(1, 2),
            norms[0].weight,
            norms[1].weight,
            **rotation(options, tables),
            eps=options.head_norm.eps,
            offset=options.head_norm.offset,
        )
    if norms:
        q, k = norms[0](q), norms[1](k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if not rotates or tables is None:
        return q, k
    q, k = rope(q, k, **rotation(options, tables))  # type: ignore[assignment]
    return q, k


def rotation(options: AttentionOptions, tables: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """The arguments of :func:`unsloth.kernels.rope.rope` for tables (B, T, R) as transformers makes them."""
    cos, sin = tables
    rotated = cos.shape[-1]
    if options.tables_in_halves:
        cos, sin = cos[..., : rotated // 2], sin[..., : rotated // 2]
    return {"cos": cos, "sin": sin, "rotary_dim": rotated, "interleaved": options.interleaved}


def _fuses(norms: list[torch.nn.Module], q: torch.Tensor) -> bool:
    return all(is_untouched(norm) and norm.weight.dtype == q.dtype for norm in norms)


def _interface(self: Any) -> Any:
    """The attention function that the model is set to; a family's own eager one stands beside its modules."""
    eager = getattr(sys.modules[type(self).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
