"""The logits of a model from its weights and its family's spec alone, in plain torch.

The mathematics of all families in one place, and the test of a spec: what it leaves out or gets wrong shows as a
difference from the model's own logits. For models without adapters and quantization, and for reading; nothing here
is fast. Shapes: B batch, T tokens, K hidden size, H heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding, gelu, linear, silu
from transformers import PreTrainedModel

from unsloth.core.errors import PlanError
from unsloth.kernels.layer_norm import layer_norm_reference
from unsloth.kernels.rms_norm import rms_norm_reference
from unsloth.kernels.rope import rope
from unsloth.models import spec


@torch.no_grad()
def logits(model: PreTrainedModel, family: spec.ModelSpec, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) for unpadded ``ids_BT``.

    Args:
        model: Only its configuration, its parameters and its rotary tables are read.
        family: The spec.
        ids_BT: Token ids.
    """
    config = model.config
    x_BTK = embedding(ids_BT, model.get_submodule(family.embedding).weight)
    x_BTK = x_BTK * spec.factor(config, family.embedding_scale)
    for i, block in enumerate(model.get_submodule(family.layers).children()):
        x_BTK = _block(model, family, block, i, x_BTK)
    x_BTK = _norm(model.get_submodule(family.final_norm), family.norm, x_BTK)
    y_BTV = linear(x_BTK, model.get_submodule(family.head).weight) * spec.factor(config, family.logits_scale)
    return _capped(y_BTV, spec.optional(config, family.logits_softcap))


def _block(model: PreTrainedModel, family: spec.ModelSpec, block: Any, i: int, x: torch.Tensor) -> torch.Tensor:
    parts = family.block
    scale = spec.factor(model.config, parts.residual_scale)

    def norm(name: str | None, value: torch.Tensor) -> torch.Tensor:
        return value if name is None else _norm(block.get_submodule(name), family.norm, value)

    seen = norm(parts.input_norm, x)
    h = x + scale * norm(parts.attention_norm, _attention(model, family, block, i, seen))
    seen = seen if parts.parallel else norm(parts.mlp_input_norm, h)
    return h + scale * norm(parts.mlp_norm, _mlp(model.config, family.mlp, block, seen))


def _norm(module: Any, norm: spec.NormSpec, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(module, norm.eps)
    if norm.kind == "layer":
        return layer_norm_reference(x, module.weight + norm.offset, None, eps)
    if norm.weight_last:
        return (module.weight + norm.offset) * rms_norm_reference(x, None, eps)
    return rms_norm_reference(x, module.weight, eps, norm.offset)


def _linear(module: Any, biased: bool, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias if biased else None)


def _attention(model: PreTrainedModel, family: spec.ModelSpec, block: Any, i: int, x: torch.Tensor) -> torch.Tensor:
    config, parts = model.config, family.attention
    module = block.get_submodule(parts.path)
    biased = spec.is_set(config, parts.bias)
    outputs = [_linear(module.get_submodule(name), biased, x) for name in parts.projections]
    size = spec.head_dim(config)
    rows = [n * size for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    q, k, v = (y.unflatten(-1, (-1, size)) for y in torch.cat(outputs, -1).split(rows, -1))
    norm = parts.head_norm
    if norm is not None and (norm.switch is None or getattr(module, norm.switch)):
        q = _norm(module.get_submodule(norm.query), family.norm, q)
        k = _norm(module.get_submodule(norm.key), family.norm, k)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if parts.rotary_switch is None or getattr(module, parts.rotary_switch):
        cos, sin = _tables(model, family, i, x)
        size = cos.shape[-1]
        if parts.rotary != "neighbours":
            cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        pairs = parts.rotary != "halves"
        q, k = rope(q, k, cos, sin, rotary_dim=size, interleaved=pairs, fast=False)  # type: ignore[assignment]
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * spec.factor(config, parts.scale)
    scores = _capped(scores, spec.optional(config, parts.softcap))
    position = torch.arange(x.shape[1], device=x.device)
    gap = position[:, None] - position
    limit = spec.window(config, parts, i)
    visible = (gap >= 0) & (gap < (x.shape[1] if limit is None else limit))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    y = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
    return _linear(module.get_submodule(parts.output), spec.is_set(config, parts.output_bias), y)


def _tables(model: PreTrainedModel, family: spec.ModelSpec, i: int, x: torch.Tensor) -> Any:
    positions = torch.arange(x.shape[1], device=x.device)[None]
    of_layer = [spec.read(model.config, "layer_types")[i]] if family.rotary_by_layer_type else []
    return model.get_submodule(family.rotary)(x, positions, *of_layer)


def _mlp(config: Any, parts: spec.MlpSpec, block: Any, x: torch.Tensor) -> torch.Tensor:
    module = block.get_submodule(parts.path)
    biased = spec.is_set(config, parts.bias)
    gate, up = torch.cat([_linear(module.get_submodule(name), biased, x) for name in parts.gate_up], -1).chunk(2, -1)
    activation = spec.activation(config, parts)
    if activation is None:
        raise PlanError("no formula for the activation", got=spec.read(config, parts.activation))
    gate = (
        silu(gate) if activation == "silu" else gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    )
    return _linear(module.get_submodule(parts.down), biased, gate * up)


def _capped(x: torch.Tensor, bound: float | None) -> torch.Tensor:
    return x if bound is None else bound * torch.tanh(x / bound)
