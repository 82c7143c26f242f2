"""The numbers of a model that llama.cpp reads from the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFValueType, Keys
from transformers import PretrainedConfig

from unsloth.core.errors import ExportError
from unsloth.export.gguf import rope
from unsloth.export.gguf.architectures import Architecture
from unsloth.models import spec as specs
from unsloth.models.spec import ModelSpec

TEXT, BOOL, INTEGER, REAL = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.UINT32, GGUFValueType.FLOAT32


@dataclass
class Metadata:
    """The entries of a file, in order, and what a reader of the file will not do as the model does.

    Attributes:
        entries: Type and value by key; lists are arrays.
        limits: Sentences for the user.
    """

    entries: dict[str, tuple[Any, GGUFValueType]] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, kind: GGUFValueType) -> None:
        """Add an entry; a value of None is left out."""
        if value is not None:
            self.entries[key] = (value, kind)


def of_model(
    spec: ModelSpec, architecture: Architecture, config: PretrainedConfig, rotated: int, name: str
) -> Metadata:
    """Everything but the tokenizer, and the type of the weights.

    Args:
        spec: Of the family.
        architecture: That will read the file.
        config: Of the model.
        rotated: Dimensions of a head that have a rotary embedding.
        name: Of the model, for people.

    Raises:
        ExportError: The model computes something that the architecture does not.
    """
    _refuse_what_differs(spec, architecture, config)
    made = Metadata()
    arch = MODEL_ARCH_NAMES[architecture.arch]
    made.add(Keys.General.ARCHITECTURE, arch, TEXT)
    made.add(Keys.General.TYPE, "model", TEXT)
    made.add(Keys.General.NAME, name or None, TEXT)
    for key, value, kind in _sizes(spec, config, rotated):
        made.add(key.format(arch=arch), value, kind)
    for key, value, kind in _scales(spec, architecture, config):
        made.add(key.format(arch=arch), value, kind)
    for key, value, kind in rope.entries(spec, architecture, config):
        made.add(key.format(arch=arch), value, kind)
    _add_window(made, arch, spec, architecture, config)
    made.limits += rope.limits(config)
    return made


def _sizes(spec: ModelSpec, config: PretrainedConfig, rotated: int) -> Iterator[tuple[str, Any, GGUFValueType]]:
    width = specs.head_dim(config)
    yield Keys.LLM.CONTEXT_LENGTH, config.max_position_embeddings, INTEGER
    yield Keys.LLM.EMBEDDING_LENGTH, config.hidden_size, INTEGER
    yield Keys.LLM.BLOCK_COUNT, config.num_hidden_layers, INTEGER
    yield Keys.LLM.FEED_FORWARD_LENGTH, config.intermediate_size, INTEGER
    yield Keys.LLM.VOCAB_SIZE, config.vocab_size, INTEGER
    yield Keys.Attention.HEAD_COUNT, config.num_attention_heads, INTEGER
    yield Keys.Attention.HEAD_COUNT_KV, config.num_key_value_heads, INTEGER
    yield Keys.Attention.KEY_LENGTH, width, INTEGER
    yield Keys.Attention.VALUE_LENGTH, width, INTEGER
    yield Keys.Rope.DIMENSION_COUNT, rotated, INTEGER
    names = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
    eps = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    if eps is None:
        raise ExportError("the configuration does not say the epsilon of the norms", got=config.model_type)
    yield Keys.Attention.LAYERNORM_RMS_EPS if spec.norm.kind == "rms" else Keys.Attention.LAYERNORM_EPS, eps, REAL


def _scales(
    spec: ModelSpec, architecture: Architecture, config: PretrainedConfig
) -> Iterator[tuple[str, Any, GGUFValueType]]:
    if architecture.scores == "file":
        yield Keys.Attention.SCALE, specs.factor(config, spec.attention.scale), REAL
    if architecture.embedding_scale == "file":
        yield Keys.LLM.EMBEDDING_SCALE, specs.factor(config, spec.embedding_scale), REAL
    if architecture.residual_scale:
        yield Keys.LLM.RESIDUAL_SCALE, specs.factor(config, spec.block.residual_scale), REAL
    if architecture.logits != "none":
        power = 1 if architecture.logits == "times" else -1
        yield Keys.LLM.LOGIT_SCALE, specs.factor(config, spec.logits_scale) ** power, REAL
    if architecture.softcaps == "both":
        yield Keys.LLM.ATTN_LOGIT_SOFTCAPPING, specs.optional(config, spec.attention.softcap), REAL
    if architecture.softcaps != "none":
        yield Keys.LLM.FINAL_LOGIT_SOFTCAPPING, specs.optional(config, spec.logits_softcap), REAL


def _add_window(
    made: Metadata, arch: str, spec: ModelSpec, architecture: Architecture, config: PretrainedConfig
) -> None:
    windows = [specs.window(config, spec.attention, layer) for layer in range(config.num_hidden_layers)]
    sizes = {window for window in windows if window is not None}
    shortest = min(sizes, default=config.max_position_embeddings)
    if not architecture.window:
        if shortest < config.max_position_embeddings:
            made.limits.append(
                f"llama.cpp has no sliding window for {arch}: beyond {shortest:,} tokens its answers differ"
            )
        return
    period = _period([window is not None for window in windows])
    if period is None or len(sizes) > 1:
        raise ExportError(
            f"llama.cpp's {arch} has sliding layers at regular places only",
            got=", ".join("sliding" if window else "full" for window in windows[:12]),
        )
    # A period of one means that no layer slides; a window must be named all the same.
    made.add(Keys.Attention.SLIDING_WINDOW.format(arch=arch), shortest, INTEGER)
    made.add(Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=arch), period, INTEGER)


def _period(sliding: list[bool]) -> int | None:
    """The p for which layer i slides just where i mod p < p - 1; 0 if all slide; None if there is none."""
    if all(sliding):
        return 0
    for period in range(1, len(sliding) + 1):
        if all((layer % period < period - 1) == slides for layer, slides in enumerate(sliding)):
            return period
    return None


def _refuse_what_differs(spec: ModelSpec, architecture: Architecture, config: PretrainedConfig) -> None:
    """Raise :class:`ExportError` for anything that the file cannot say, and the weights cannot take up."""
    arch = MODEL_ARCH_NAMES[architecture.arch]

    def refuse(what: str, got: object) -> None:
        raise ExportError(
            f"llama.cpp's {arch} {what}", got=got, do="Save the model with save_pretrained_merged instead."
        )

    found = specs.activation(config, spec.mlp)
    if found not in architecture.activations:
        refuse(f"has the activation {architecture.activations[0]}", found)
    if architecture.embedding_scale == "none" and specs.factor(config, spec.embedding_scale) != 1.0:
        refuse("does not scale the embedding", specs.factor(config, spec.embedding_scale))
    if architecture.logits == "none" and specs.factor(config, spec.logits_scale) != 1.0:
        refuse("does not scale the logits", specs.factor(config, spec.logits_scale))
    if not architecture.residual_scale and specs.factor(config, spec.block.residual_scale) != 1.0:
        refuse("does not scale the residual stream", specs.factor(config, spec.block.residual_scale))
    if architecture.softcaps == "both" and None in (
        specs.optional(config, spec.attention.softcap),
        specs.optional(config, spec.logits_softcap),
    ):
        refuse("always caps scores and logits", None)
    if architecture.square and specs.head_dim(config) * config.num_attention_heads != config.hidden_size:
        refuse("needs heads that are together as wide as the model", specs.head_dim(config))
    _refuse_other_blocks(spec, architecture, config, refuse)


def _refuse_other_blocks(spec: ModelSpec, architecture: Architecture, config: PretrainedConfig, refuse: Any) -> None:
    norms = spec.attention.head_norm
    if norms is not None and specs.is_set(config, norms.switch or True):
        if config.num_hidden_layers < architecture.head_norm_from:
            refuse(f"has norms of heads from {architecture.head_norm_from} layers on", config.num_hidden_layers)
    if spec.attention.rotary_switch == "use_rope":
        without = [not used for used in config.no_rope_layers]
        period = architecture.rope_period
        if without != [(layer + 1) % period == 0 for layer in range(config.num_hidden_layers)]:
            refuse(f"leaves out the rotary embedding of every layer number {period}", config.no_rope_layers)
