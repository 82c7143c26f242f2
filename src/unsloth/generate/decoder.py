"""A decoder computed from its family's spec and the model's live tensors, token by token in a flat batch.

The mathematics is that of :mod:`unsloth.models.reference`; attention and cache belong to the caller, who knows which
tokens are whose. Shapes: T tokens, K hidden size, H query heads, G key heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from unsloth.core.errors import PlanError
from unsloth.generate.adapter_bank import AdapterBank, Selection, Site
from unsloth.generate.weights import Projection, read_projection, saved_module
from unsloth.kernels.layer_norm import layer_norm_reference
from unsloth.kernels.qk_norm_rope import qk_norm_rope
from unsloth.kernels.rope import rope
from unsloth.layers.norm import NormOptions, add_and_normalize, normalize
from unsloth.models import spec

Attend = Callable[["Layer", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q (T, H, D), k (T, G, D), v (T, G, D)) to (T, H, D). Positions are not in q and k yet (see
:meth:`Decoder.position`); keys and values are to be put into the cache."""


@dataclass(frozen=True)
class Norm:
    """A norm module, and what it computes."""

    module: Any
    options: NormOptions

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        weight = self.module.weight
        if weight.dim() > 1:  # a weight for each head (Cohere)
            return layer_norm_reference(x, weight + self.options.offset, None, self.options.eps)
        return normalize(x, weight, self.options)


@dataclass(frozen=True)
class Layer:
    """A block.

    Attributes:
        index: Of the block.
        scale: Of the scores.
        softcap: Bound of the scores; 0 for none.
        window: Tokens that a query sees; 0 for all.
        rotary: Key of the rotary tables, or None.
        head_norms: Of queries and keys, or None.
        qkv: The projections of attention: three, or one with all their rows.
        output: Its last.
        gate_up: Those of the MLP: two, or one with all their rows.
        down: Its last.
        norms: By their names in :class:`unsloth.models.spec.BlockSpec`.
    """

    index: int
    scale: float
    softcap: float
    window: int
    rotary: str | None
    head_norms: tuple[Norm, Norm] | None
    qkv: Site
    output: Site
    gate_up: Site
    down: Site
    norms: dict[str, Norm]


class Decoder:
    """The computation of one model.

    Args:
        model: The transformers model, below any layer of PEFT.
        family: Its spec.
        bank: The adapters.
        max_len: Positions that there may be.
        fast: False takes the plain references.

    Raises:
        PlanError: Something in the model cannot be computed from the spec; the message says what.
    """

    def __init__(
        self, model: PreTrainedModel, family: spec.ModelSpec, bank: AdapterBank, max_len: int, fast: bool = True
    ) -> None:
        self.model, self.family, self.bank, self.fast = model, family, bank, fast
        config = model.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.hidden_size = spec.head_dim(config), config.hidden_size
        self._embedding = saved_module(model.get_submodule(family.embedding))
        if isinstance(self._embedding, LoraLayer) or not hasattr(self._embedding, "weight"):
            raise PlanError("the engine cannot apply an adapter on the embedding", got=type(self._embedding).__name__)
        self.dtype, self.device = self._embedding.weight.dtype, self._embedding.weight.device
        activation = spec.activation(config, family.mlp)
        if activation is None:
            raise PlanError("no formula for the activation", got=spec.read(config, family.mlp.activation))
        self._activation: str = activation
        self._embedding_scale = spec.factor(config, family.embedding_scale)
        self._residual_scale = spec.factor(config, family.block.residual_scale)
        self._logits_scale = spec.factor(config, family.logits_scale)
        self._logits_softcap: float = spec.optional(config, family.logits_softcap) or 0.0
        self.layers = [self._read_layer(block, i) for i, block in enumerate(model.get_submodule(family.layers))]
        self._final_norm = self._norm(model.get_submodule(family.final_norm))
        self._head = bank.site("head", [read_projection(model, family.head)])
        self.vocabulary = self._head.projections[0].out_features
        self._tables = self._make_tables(max_len)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the model that a step reads; none of the adapters."""
        found = [self._embedding.weight, self._final_norm.module.weight]
        for layer in self.layers:
            found += [norm.module.weight for norm in (*layer.norms.values(), *(layer.head_norms or ()))]
        return found + [tensor for projection in self.projections() for tensor in projection.tensors()]

    def projections(self) -> list[Projection]:
        """All of them."""
        sites = [site for layer in self.layers for site in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return [projection for site in [*sites, self._head] for projection in site.projections]

    @property
    def opaque(self) -> bool:
        """Whether some layer must be called as a module, which no graph can hold."""
        return any(projection.opaque for projection in self.projections())

    def embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """(T, K) of token ids."""
        return embedding(tokens_T, self._embedding.weight)

    def hidden(self, x_TK: torch.Tensor, attend: Attend, adapters: Selection) -> torch.Tensor:
        """Hidden states (T, K) before the final norm, of the embeddings ``x_TK``."""
        if self._embedding_scale != 1:
            x_TK = x_TK * torch.tensor(self._embedding_scale, dtype=x_TK.dtype)
        more_TK: torch.Tensor | None = None
        for layer in self.layers:
            x_TK, more_TK = self._block(layer, x_TK, more_TK, attend, adapters)
        return x_TK if more_TK is None else x_TK + more_TK

    def logits(self, x_TK: torch.Tensor, adapters: Selection) -> torch.Tensor:
        """Logits (T, V) of hidden states."""
        y_TV = self._head(self._final_norm(x_TK), adapters, self.fast)[0]
        if self._logits_scale != 1:
            y_TV = y_TV * self._logits_scale
        if self._logits_softcap:
            y_TV = self._logits_softcap * torch.tanh(y_TV / self._logits_softcap)
        return y_TV

    def _block(
        self, layer: Layer, x: torch.Tensor, more: torch.Tensor | None, attend: Attend, adapters: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream, what the next block adds to it first) of the same two; that addition and a norm are one."""
        norms, scale = layer.norms, self._residual_scale
        if more is not None and "input_norm" in norms:
            norm = norms["input_norm"]
            seen, x = add_and_normalize(more, x, norm.module.weight, norm.options)
        else:
            x = x if more is None else x + more
            seen = norms["input_norm"](x) if "input_norm" in norms else x
        a = self._attention(layer, seen, attend, adapters)
        a = norms["attention_norm"](a) if "attention_norm" in norms else a
        a = a if scale == 1 else a * scale
        if self.family.block.parallel:
            h = x + a
        elif "mlp_input_norm" in norms:
            norm = norms["mlp_input_norm"]
            seen, h = add_and_normalize(a, x, norm.module.weight, norm.options)
        else:
            seen = h = x + a
        m = self._mlp(layer, seen, adapters)
        m = norms["mlp_norm"](m) if "mlp_norm" in norms else m
        return h, m if scale == 1 else m * scale

    def _attention(self, layer: Layer, x: torch.Tensor, attend: Attend, adapters: Selection) -> torch.Tensor:
        outputs = layer.qkv(x, adapters, self.fast)
        if len(outputs) == 1:
            rows, key_rows = self.heads * self.head_dim, self.key_heads * self.head_dim
            outputs = list(outputs[0].split((rows, key_rows, key_rows), -1))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs)
        y = attend(layer, q, k, v)
        return layer.output(y.reshape(x.shape[0], -1), adapters, self.fast)[0]

    def plain_tables(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines (positions, D/2) where nothing but a rotation of the whole head in halves is done."""
        tables = {} if layer.rotary is None else self._tables[layer.rotary]
        whole = tables and tables["rotary_dim"] == self.head_dim and not tables["interleaved"]
        if not whole or layer.head_norms is not None:
            return None
        return tables["cos"], tables["sin"]

    def position(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of the heads, and rotary embedding of (T, H, D) and (T, G, D)."""
        norms = layer.head_norms
        tables = {} if layer.rotary is None else self._tables[layer.rotary]
        if norms is not None and tables and self._fuses(norms, q):
            weights, options = (norms[0].module.weight, norms[1].module.weight), norms[0].options
            q, k = qk_norm_rope(
                _heads_first(q), _heads_first(k), *weights, eps=options.eps, offset=options.offset,
                positions=positions[None], **tables,
            )  # fmt: skip
            return q[0].transpose(0, 1), k[0].transpose(0, 1)
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        if not tables:
            return q, k
        turned = rope(_heads_first(q), _heads_first(k), positions=positions[None], fast=self.fast, **tables)
        return tuple(y[0].transpose(0, 1) for y in turned if y is not None)  # type: ignore[return-value]

    def _fuses(self, norms: tuple[Norm, Norm], q: torch.Tensor) -> bool:
        weights = [norm.module.weight for norm in norms]
        rms = norms[0].options.kind == "rms"
        return self.fast and q.is_cuda and rms and all(w.dim() == 1 and w.dtype == q.dtype for w in weights)

    def _mlp(self, layer: Layer, x: torch.Tensor, adapters: Selection) -> torch.Tensor:
        y = layer.gate_up.gated(x, adapters, self._activation, self.fast)
        return layer.down(y, adapters, self.fast)[0]

    def _read_layer(self, block: Any, i: int) -> Layer:
        family, config = self.family, self.model.config
        parts, mlp = family.attention, family.mlp
        attention = block.get_submodule(parts.path)
        norm = parts.head_norm
        switched = norm is not None and (norm.switch is None or getattr(attention, norm.switch))
        head_norms = (norm.query, norm.key) if norm is not None and switched else None
        rotates = parts.rotary_switch is None or bool(getattr(attention, parts.rotary_switch))
        kind = spec.read(config, "layer_types")[i] if family.rotary_by_layer_type else ""
        biases = [spec.is_set(config, rule) for rule in (parts.bias, parts.output_bias, mlp.bias)]
        names = ("input_norm", "attention_norm", "mlp_input_norm", "mlp_norm")
        present = {name: getattr(family.block, name) for name in names if getattr(family.block, name) is not None}
        return Layer(
            index=i,
            scale=spec.factor(config, parts.scale),
            softcap=spec.optional(config, parts.softcap) or 0.0,
            window=spec.window(config, parts, i) or 0,
            rotary=kind if rotates else None,
            head_norms=None
            if head_norms is None
            else (self._norm(getattr(attention, head_norms[0])), self._norm(getattr(attention, head_norms[1]))),
            qkv=self._site(i, parts.path, parts.projections, biases[0]),
            output=self._site(i, parts.path, (parts.output,), biases[1]),
            gate_up=self._site(i, mlp.path, mlp.gate_up, biases[2]),
            down=self._site(i, mlp.path, (mlp.down,), biases[2]),
            norms={name: self._norm(block.get_submodule(path)) for name, path in present.items()},
        )

    def _site(self, i: int, part: str, names: tuple[str, ...], biased: bool) -> Site:
        place = f"{self.family.layers}.{i}.{part}"
        projections: list[Projection] = [read_projection(self.model, f"{place}.{name}", biased) for name in names]
        return self.bank.site(f"{place}.{'+'.join(names)}", projections)

    def _norm(self, module: Any) -> Norm:
        options, module = self.family.norm, saved_module(module)
        return Norm(
            module, NormOptions(options.kind, getattr(module, options.eps), options.offset, options.weight_last)
        )

    def _make_tables(self, max_len: int) -> dict[str, dict[str, Any]]:
        """Arguments of :func:`unsloth.kernels.rope.rope` for every kind of layer, out of the model's own module."""
        rotary = self.model.get_submodule(self.family.rotary)
        positions = torch.arange(max_len, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        tables: dict[str, dict[str, Any]] = {}
        for kind in {layer.rotary for layer in self.layers if layer.rotary is not None}:
            cos, sin = (t[0].clone() for t in rotary(like, positions, *([kind] if kind else [])))
            rotated, halves = cos.shape[-1], self.family.attention.rotary != "neighbours"
            if halves:
                cos, sin = cos[:, : rotated // 2].contiguous(), sin[:, : rotated // 2].contiguous()
            interleaved = self.family.attention.rotary != "halves"
            tables[kind] = {"cos": cos, "sin": sin, "rotary_dim": rotated, "interleaved": interleaved}
        return tables


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as (1, H, T, D)."""
    return x.transpose(0, 1)[None]
