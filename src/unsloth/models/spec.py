"""What differs between model families, as data.

A :class:`ModelSpec` says where the parts of a decoder are and what they compute, in the words of transformers: paths
of modules, and names of attributes of the configuration. It holds no logic; :mod:`unsloth.models.plan` swaps layers
by it, :mod:`unsloth.models.reference` computes a model's logits from nothing else, which is how a spec is tested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from unsloth.core.errors import PlanError

Rotary = Literal["halves", "neighbours", "neighbours, tables in halves"]


@dataclass(frozen=True)
class Scale:
    """A factor: an attribute of the configuration to some power.

    Attributes:
        attribute: For instance ``"residual_multiplier"``.
        power: -1 where the family divides, 0.5 for a square root, and so on.
    """

    attribute: str
    power: float = 1.0


@dataclass(frozen=True)
class NormSpec:
    """The norms of a family; the formulas are in :mod:`unsloth.layers.norm`.

    Attributes:
        kind: ``"rms"`` or ``"layer"``.
        eps: The norm module's attribute that holds it.
        offset: Added to the weight: 1 where checkpoints store ``weight - 1``.
        weight_last: Whether the result is rounded to the input's dtype before the weight is multiplied.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: str = "variance_epsilon"
    offset: float = 0.0
    weight_last: bool = True


@dataclass(frozen=True)
class Window:
    """A sliding window of attention.

    Attributes:
        attribute: The configuration's attribute with the number of tokens that a query sees, itself included; it may
            be None there.
        by_layer_type: Whether only layers that ``config.layer_types`` calls sliding have it.
    """

    attribute: str = "sliding_window"
    by_layer_type: bool = True


@dataclass(frozen=True)
class HeadNorm:
    """Norms of every head of queries and of keys, of the family's kind, over the head dimension.

    Attributes:
        query: Name of the module for queries, in the attention module.
        key: Likewise for keys.
        switch: The attention module's attribute that says whether they exist; None: they do.
    """

    query: str = "q_norm"
    key: str = "k_norm"
    switch: str | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a block; see :mod:`unsloth.layers.attention` for the mathematics.

    Attributes:
        path: Of the module, in the block.
        projections: Names of q, k and v, or the one name of a layer that holds all their rows.
        output: Name of the output projection.
        bias: Whether the projections have biases, or the configuration's attribute that says so.
        output_bias: Likewise for the output projection.
        scale: Of the scores.
        softcap: The configuration's attribute with the bound of the scores, which may be None there.
        window: Of some layers or of all.
        head_norm: Norms of the heads.
        rotary: Which dimensions the rotary embedding pairs: one of each of the two halves, or neighbours. Its tables
            hold every angle twice: in two halves, or side by side for neighbours unless they are in halves, too.
        rotary_switch: The attention module's attribute that says whether a layer has a rotary embedding.
    """

    path: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    bias: bool | str = False
    output_bias: bool | str = False
    scale: Scale = Scale("head_dim", -0.5)
    softcap: str | None = None
    window: Window | None = None
    head_norm: HeadNorm | None = None
    rotary: Rotary = "halves"
    rotary_switch: str | None = None

    def __post_init__(self) -> None:
        if len(self.projections) not in (1, 3):
            raise PlanError("projections are three names or one", got=self.projections, do="Name q, k and v.")


@dataclass(frozen=True)
class MlpSpec:
    """The gated MLP of a block.

    Attributes:
        path: Of the module, in the block.
        gate_up: Names of gate and up, or the one name of a layer that holds gate's rows, then up's.
        down: Name of the last layer.
        bias: Whether they have biases, or the configuration's attribute that says so.
        activation: The configuration's attribute that names the activation.
    """

    path: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    bias: bool | str = False
    activation: str = "hidden_act"

    def __post_init__(self) -> None:
        if len(self.gate_up) not in (1, 2):
            raise PlanError("gate_up is two names or one", got=self.gate_up, do="Name gate and up.")


@dataclass(frozen=True)
class BlockSpec:
    """How a block is put together; see :mod:`unsloth.layers.block` for the three forms.

    Attributes:
        input_norm: Norm before attention, or None.
        attention_norm: Norm after attention, or None.
        mlp_input_norm: Norm before the MLP, or None.
        mlp_norm: Norm after the MLP, or None.
        parallel: Whether attention and MLP see the same.
        residual_scale: Of what is added to the residual stream.
        attention_dropout: Dropout after attention.
        mlp_dropout: Dropout after the MLP.
    """

    input_norm: str | None = "input_layernorm"
    attention_norm: str | None = None
    mlp_input_norm: str | None = "post_attention_layernorm"
    mlp_norm: str | None = None
    parallel: bool = False
    residual_scale: Scale | None = None
    attention_dropout: str | None = None
    mlp_dropout: str | None = None

    def __post_init__(self) -> None:
        if self.parallel and self.mlp_input_norm is not None:
            raise PlanError(
                "in a parallel block the MLP sees what attention sees", got=self.mlp_input_norm, do="Leave one out."
            )


@dataclass(frozen=True)
class ModelSpec:
    """One family of decoders.

    Attributes:
        name: Of the family.
        model_types: The configuration's ``model_type`` of its members.
        attention: Of a block.
        mlp: Of a block.
        block: What surrounds them.
        norm: What all its norms compute.
        embedding: Path of the token embedding.
        embedding_scale: Of its output.
        layers: Path of the list of blocks.
        final_norm: Path of the norm before the head.
        rotary: Path of the module that makes the tables of the rotary embedding.
        rotary_by_layer_type: Whether it makes one for each of ``config.layer_types``.
        head: Path of the output head.
        logits_scale: Of its output.
        logits_softcap: The configuration's attribute with the bound of the logits, which may be None there.
    """

    name: str
    model_types: tuple[str, ...]
    attention: AttentionSpec = AttentionSpec()
    mlp: MlpSpec = MlpSpec()
    block: BlockSpec = BlockSpec()
    norm: NormSpec = NormSpec()
    embedding: str = "model.embed_tokens"
    embedding_scale: Scale | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    rotary_by_layer_type: bool = False
    head: str = "lm_head"
    logits_scale: Scale | None = None
    logits_softcap: str | None = None


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read(config: PretrainedConfig, attribute: str) -> Any:
    """``config.attribute``; raise :class:`PlanError` if the configuration has no such attribute."""
    if attribute == "head_dim":
        return head_dim(config)
    if not hasattr(config, attribute):
        raise PlanError(
            f"the configuration of this {config.model_type} model lacks what its family's spec names",
            got=attribute,
            do="Load it with fast_layers=False, or correct the spec in models/families.",
        )
    return getattr(config, attribute)


def head_dim(config: PretrainedConfig) -> int:
    """Dimension of an attention head, which some configurations leave to be computed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def factor(config: PretrainedConfig, scale: Scale | None) -> float:
    """The value of a scale; 1 where the family has none."""
    return 1.0 if scale is None else float(read(config, scale.attribute)) ** scale.power


def optional(config: PretrainedConfig, attribute: str | None) -> Any:
    """The value of an attribute that the spec may leave out; None then."""
    return None if attribute is None else read(config, attribute)


def is_set(config: PretrainedConfig, rule: bool | str) -> bool:
    """A spec's ``bool | str``: a constant, or the configuration's attribute."""
    return rule if isinstance(rule, bool) else bool(read(config, rule))


def window(config: PretrainedConfig, attention: AttentionSpec, layer: int) -> int | None:
    """Tokens that a query of block ``layer`` sees, or None for all before it."""
    if attention.window is None:
        return None
    if attention.window.by_layer_type and read(config, "layer_types")[layer] != "sliding_attention":
        return None
    return read(config, attention.window.attribute)


def activation(config: PretrainedConfig, mlp: MlpSpec) -> str | None:
    """Our name of the MLP's activation, None where it is one that we have no formula for."""
    return _ACTIVATIONS.get(read(config, mlp.activation))


def resolve_targets(spec: ModelSpec | None, names: Iterable[str]) -> list[str]:
    """The names of linear layers as a family has them, each once.

    The seven names of the llama family (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj) stand for
    their part of a block everywhere; any other name, or any name without a spec, stays as it is.
    """
    if spec is None:
        return list(dict.fromkeys(names))
    attention, mlp = spec.attention, spec.mlp
    q, k, v = attention.projections if len(attention.projections) == 3 else attention.projections * 3
    gate, up = mlp.gate_up if len(mlp.gate_up) == 2 else mlp.gate_up * 2
    here = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": attention.output}
    here |= {"gate_proj": gate, "up_proj": up, "down_proj": mlp.down}
    return list(dict.fromkeys(here.get(name, name) for name in names))
