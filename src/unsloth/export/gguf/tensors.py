"""Which tensor of a model becomes which tensor of the file, and what is done to its values on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES
from transformers import PretrainedConfig

from unsloth.core.errors import ExportError
from unsloth.export.gguf.architectures import Architecture
from unsloth.models import spec as specs
from unsloth.models.spec import ModelSpec


@dataclass(frozen=True)
class Rule:
    """How one tensor is written.

    Attributes:
        slot: The tensor of the file, as the ``gguf`` package numbers it.
        name: Its name in the file.
        heads: Number of heads whose rows are reordered, 0 for none. Families that rotate the two halves of a head
            together are read by architectures that rotate neighbours: within a head of dimension d, row j of the
            first half goes to 2j, row j of the second to 2j + 1. Rows beyond ``rotated`` stay.
        rotated: How many rows of each head are reordered.
        offset: Added to the values, in float32.
        factor: The values are multiplied by it, in float32.
        optional: The model need not have it.
    """

    slot: MODEL_TENSOR
    name: str
    heads: int = 0
    rotated: int = 0
    offset: float = 0.0
    factor: float = 1.0
    optional: bool = False

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is written: reordered, and float32 where its values change."""
        if self.heads:
            tensor = self.reorder(tensor)
        if self.offset or self.factor != 1.0:
            tensor = (tensor.float() + self.offset) * self.factor
        return tensor.contiguous()

    def reorder(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of [heads * d, ...] from halves to neighbours."""
        heads = tensor.reshape(self.heads, -1, *tensor.shape[1:])
        turned, rest = heads[:, : self.rotated], heads[:, self.rotated :]
        pairs = turned.reshape(self.heads, 2, self.rotated // 2, *tensor.shape[1:]).transpose(1, 2)
        return torch.cat([pairs.reshape(turned.shape), rest], dim=1).reshape(tensor.shape)


def rules(spec: ModelSpec, architecture: Architecture, config: PretrainedConfig, rotated: int) -> dict[str, Rule]:
    """A rule for every tensor that a model of this family and configuration may have, by its name in transformers.

    Args:
        spec: Of the family.
        architecture: That will read the file.
        config: Of the model.
        rotated: Dimensions of a head that have a rotary embedding.
    """
    found: dict[str, Rule] = {}
    found[f"{spec.embedding}.weight"] = _rule(MODEL_TENSOR.TOKEN_EMBD)
    found[f"{spec.final_norm}.weight"] = _norm(MODEL_TENSOR.OUTPUT_NORM, spec)
    if architecture.head:
        found[f"{spec.head}.weight"] = replace(_rule(MODEL_TENSOR.OUTPUT), optional=True)
    for number in range(config.num_hidden_layers):
        block = f"{spec.layers}.{number}"
        for path, rule in _attention(spec, architecture, config, rotated, number):
            found[f"{block}.{spec.attention.path}.{path}"] = rule
        for path, rule in _mlp(spec, architecture, config, number):
            found[f"{block}.{spec.mlp.path}.{path}"] = rule
        for path, slot in _block_norms(spec).items():
            found[f"{block}.{path}.weight"] = _norm(slot, spec, number)
    return found


def _rule(slot: MODEL_TENSOR, block: int = -1, kind: str = "weight") -> Rule:
    return Rule(slot, f"{TENSOR_NAMES[slot].format(bid=block)}.{kind}")


def _norm(slot: MODEL_TENSOR, spec: ModelSpec, block: int = -1) -> Rule:
    return replace(_rule(slot, block), offset=spec.norm.offset)


def _block_norms(spec: ModelSpec) -> dict[str, MODEL_TENSOR]:
    block = spec.block
    slots = {
        block.input_norm: MODEL_TENSOR.ATTN_NORM,
        block.attention_norm: MODEL_TENSOR.ATTN_POST_NORM,
        block.mlp_input_norm: MODEL_TENSOR.FFN_NORM,
        block.mlp_norm: MODEL_TENSOR.FFN_POST_NORM,
    }
    return {path: slot for path, slot in slots.items() if path is not None}


def _attention(
    spec: ModelSpec, architecture: Architecture, config: PretrainedConfig, rotated: int, block: int
) -> Iterator[tuple[str, Rule]]:
    attention = spec.attention
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    turn = attention.rotary == "halves" and architecture.pairs == "neighbours" and _is_rotated(architecture, block)
    if attention.rotary != "halves" and architecture.pairs == "halves":
        raise ExportError(f"{architecture.arch.name} has no rule for rotary embeddings of neighbours", got=spec.name)
    factor = _score_factor(spec, architecture, config)
    normed = attention.head_norm is not None and specs.is_set(config, attention.head_norm.switch or True)
    slots = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V)
    heads = (queries, keys, 0)
    if len(attention.projections) == 1:
        slots, heads = (MODEL_TENSOR.ATTN_QKV,), (0,)  # type: ignore[assignment]
    for name, slot, count in zip(attention.projections, slots, heads, strict=True):
        scaled = factor if slot is MODEL_TENSOR.ATTN_Q and not normed else 1.0
        order = {"heads": count, "rotated": rotated} if turn and count else {}
        for kind in ("weight", "bias") if slot in architecture.biases else ("weight",):
            optional = kind == "bias" and not specs.is_set(config, attention.bias)
            yield (
                f"{name}.{kind}",
                replace(_rule(slot, block, kind), factor=scaled, optional=optional, **order),  # type: ignore[arg-type]
            )
    yield from _linear(attention.output, MODEL_TENSOR.ATTN_OUT, architecture, block, attention.output_bias, config)
    if normed and attention.head_norm is not None:
        query = _norm(MODEL_TENSOR.ATTN_Q_NORM, spec, block)
        yield f"{attention.head_norm.query}.weight", replace(query, factor=factor)
        yield f"{attention.head_norm.key}.weight", _norm(MODEL_TENSOR.ATTN_K_NORM, spec, block)


def _is_rotated(architecture: Architecture, block: int) -> bool:
    return not architecture.rope_period or (block + 1) % architecture.rope_period != 0


def _mlp(
    spec: ModelSpec, architecture: Architecture, config: PretrainedConfig, block: int
) -> Iterator[tuple[str, Rule]]:
    slots = (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP)
    for name, slot in zip(spec.mlp.gate_up, slots[-len(spec.mlp.gate_up) :], strict=True):
        yield from _linear(name, slot, architecture, block, spec.mlp.bias, config)
    yield from _linear(spec.mlp.down, MODEL_TENSOR.FFN_DOWN, architecture, block, spec.mlp.bias, config)


def _linear(
    name: str,
    slot: MODEL_TENSOR,
    architecture: Architecture,
    block: int,
    bias: bool | str,
    config: PretrainedConfig,
) -> Iterator[tuple[str, Rule]]:
    yield f"{name}.weight", _rule(slot, block)
    if slot in architecture.biases:
        yield f"{name}.bias", replace(_rule(slot, block, "bias"), optional=not specs.is_set(config, bias))


def _score_factor(spec: ModelSpec, architecture: Architecture, config: PretrainedConfig) -> float:
    """What queries are multiplied by, so that the architecture's own scale of the scores gives the family's."""
    wanted = specs.factor(config, spec.attention.scale)
    if architecture.scores == "file":
        return 1.0
    width = specs.head_dim(config)
    if architecture.scores == "gemma" and config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}.get(spec.name):
        width = config.hidden_size // config.num_attention_heads  # llama.cpp knows the 27B models by their depth
    factor = wanted * width**0.5
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor


def matched(names: Iterable[str], by_name: dict[str, Rule], architecture: Architecture) -> None:
    """Check that every tensor has a rule, and every rule its tensor.

    Raises:
        ExportError: Names the tensor.
    """
    there = set(names)
    without = sorted(there - by_name.keys())
    if without:
        raise ExportError(
            f"the architecture {architecture.arch.name.lower()} of llama.cpp has no place for the tensor",
            got=without[0],
            do="Save the model with save_pretrained_merged, which keeps every tensor.",
        )
    missing = sorted(name for name, rule in by_name.items() if not rule.optional and name not in there)
    if missing:
        raise ExportError("the model lacks a tensor that its family has", got=missing[0], do="Load it again.")
