"""The rotary embedding of a model in llama.cpp's words.

Frequency j of a head with n rotated dimensions is ``theta ** (-2 j / n)``. A configuration may change the frequencies
in ways that llama.cpp knows by name (linear, YaRN), or by a factor for each frequency that it divides by (Llama 3's
way, and LongRoPE's two sets).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFValueType, Keys
from transformers import PretrainedConfig

from unsloth.core.errors import ExportError
from unsloth.export.gguf.architectures import Architecture
from unsloth.models import spec as specs
from unsloth.models.spec import ModelSpec

_REAL, _TEXT, _INTEGER = GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.UINT32
_PLAIN = ("default", "dynamic")  # dynamic changes nothing within the original length

# What llama.cpp does not read from the file for these architectures.
_YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


def parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of the layers that see everything; transformers keeps a set for each type of layer in some."""
    found = dict(config.rope_parameters or {})
    return dict(found.get("full_attention", found)) if "rope_theta" not in found else found


def rotated_dimensions(config: PretrainedConfig) -> int:
    """How many dimensions of a head are rotated."""
    share = parameters(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return int(specs.head_dim(config) * (1.0 if share is None else share))


def entries(
    spec: ModelSpec, architecture: Architecture, config: PretrainedConfig
) -> Iterator[tuple[str, Any, GGUFValueType]]:
    """The metadata; keys still lack the architecture's name.

    Raises:
        ExportError: A way of scaling that llama.cpp, or this architecture in it, does not know.
    """
    full = parameters(config)
    kind = full.get("rope_type", "default")
    yield Keys.Rope.FREQ_BASE, float(full["rope_theta"]), _REAL
    if spec.rotary_by_layer_type:
        sliding = config.rope_parameters.get("sliding_attention", full)
        if sliding.get("rope_type", "default") != "default":
            raise _unknown(sliding["rope_type"], config)
        yield Keys.Rope.FREQ_BASE_SWA, float(sliding["rope_theta"]), _REAL
    if kind == "linear":
        yield Keys.Rope.SCALING_TYPE, "linear", _TEXT
        yield Keys.Rope.SCALING_FACTOR, float(full["factor"]), _REAL
    elif kind == "yarn":
        yield from _yarn(full, config)
    elif kind == "longrope" and architecture.rope_factors == "two":
        original = _original_length(full, config)
        scale = config.max_position_embeddings / original
        computed = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        yield Keys.Rope.SCALING_ORIG_CTX_LEN, original, _INTEGER
        yield Keys.Rope.SCALING_ATTN_FACTOR, float(full.get("attention_factor") or computed), _REAL
    elif kind not in _PLAIN and not (kind == "llama3" and architecture.rope_factors == "one"):
        raise _unknown(kind, config)


def _yarn(full: dict[str, Any], config: PretrainedConfig) -> Iterator[tuple[str, Any, GGUFValueType]]:
    factor = float(full["factor"])
    for name, only in _YARN_FIXED.items():
        if full.get(name, only) not in (only, None):
            raise _unknown(f"yarn with {name}={full[name]}", config)
    yield Keys.Rope.SCALING_TYPE, "yarn", _TEXT
    yield Keys.Rope.SCALING_FACTOR, factor, _REAL
    yield Keys.Rope.SCALING_ORIG_CTX_LEN, _original_length(full, config), _INTEGER
    if full.get("attention_factor"):
        # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this number
        yield Keys.Rope.SCALING_ATTN_FACTOR, full["attention_factor"] / (0.1 * math.log(factor) + 1), _REAL


def _original_length(full: dict[str, Any], config: PretrainedConfig) -> int:
    own = getattr(config, "original_max_position_embeddings", None)
    return int(full.get("original_max_position_embeddings") or own or config.max_position_embeddings)


def factors(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The factors of the frequencies as tensors of the file, [rotated / 2] in float32; none for most models."""
    full = parameters(config)
    if full.get("rope_type") == "longrope":
        slots = {"long_factor": MODEL_TENSOR.ROPE_FACTORS_LONG, "short_factor": MODEL_TENSOR.ROPE_FACTORS_SHORT}
        return {f"{TENSOR_NAMES[slot]}.weight": torch.tensor(full[key]).float() for key, slot in slots.items()}
    if full.get("rope_type") == "llama3":
        return {f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight": _llama3(full, config)}
    return {}


def _llama3(full: dict[str, Any], config: PretrainedConfig) -> torch.Tensor:
    """What Llama 3.1 divides its frequencies by: 1 for the fast ones, ``factor`` for the slow, a blend between.

    With w the number of turns of a frequency within the original length, the blend is
    ``1 / ((1 - s) / factor + s)``, where s goes from 0 at w = low_freq_factor to 1 at w = high_freq_factor.
    """
    count = rotated_dimensions(config)
    frequencies = full["rope_theta"] ** (-torch.arange(0, count, 2, dtype=torch.float64) / count)
    turns = full["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = full["low_freq_factor"], full["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / full["factor"] + smooth)).float()


def limits(config: PretrainedConfig) -> list[str]:
    """What llama.cpp does not do as transformers does."""
    if parameters(config).get("rope_type") != "dynamic":
        return []
    return [f"llama.cpp has no dynamic scaling: beyond {config.max_position_embeddings:,} tokens its answers differ"]


def _unknown(kind: str, config: PretrainedConfig) -> ExportError:
    return ExportError(
        f"llama.cpp has no rule for the rotary scaling of this {config.model_type} model",
        got=kind,
        do="Save the model with save_pretrained_merged instead.",
    )
