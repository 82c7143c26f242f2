"""Contexts longer than a model was made for: scaling of rotary position embeddings (RoPE).

A head's rotation at position p by frequency f_i is the angle p * f_i. To use more positions than a model saw,
its frequencies are lowered:

- linear (Chen et al., 2023, arXiv:2306.15595): every f_i divided by the factor s.
- dynamic: the base is raised as the sequence grows, so short texts are left alone.
- yarn (Peng et al., 2023, arXiv:2309.00071): slow frequencies divided by s, fast ones kept, a ramp between, and
  cosines and sines scaled by 0.1 ln(s) + 1. The default here for models without a scaling of their own.
- llama3: like yarn's split, with the two wavelengths given in the configuration.
- longrope (Ding et al., 2024, arXiv:2402.13753): a divisor for each frequency, from the configuration.

A model that has a scaling keeps its kind. transformers computes the frequencies from ``rope_parameters`` of the
configuration, so a saved configuration carries the scaling along.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from unsloth.core.errors import ConfigError

_REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor"},
}
_YARN_OPTIONS = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_OPTIONAL = {"yarn": _YARN_OPTIONS, "longrope": {"factor", "attention_factor"}}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class Scaling:
    """A configuration's scaling after it was changed: what to write down so that it can be had again.

    Attributes:
        rope_parameters: As in the configuration (one mapping a kind of layer, where the model has several).
        max_position_embeddings: As in the configuration, in tokens.
    """

    rope_parameters: Mapping[str, Any]
    max_position_embeddings: int

    @property
    def kind(self) -> str:
        """The kind of scaling, such as ``"yarn"``, of the layers that attend to the whole sequence."""
        parameters = self.rope_parameters
        return _kind(parameters[_FULL_ATTENTION] if _is_nested(parameters) else parameters)

    def apply(self, config: PretrainedConfig) -> None:
        """Put the scaling into a model's configuration."""
        text = config.get_text_config()
        text.rope_parameters = copy.deepcopy(dict(self.rope_parameters))
        text.max_position_embeddings = self.max_position_embeddings


def longest(config: PretrainedConfig) -> int | None:
    """The longest sequence a configuration provides for, in tokens; None if it sets no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = _flat(text)
    if positions is None or rope is None:
        return positions
    # These two leave max_position_embeddings at the length before scaling (yarn: in some configurations).
    if _kind(rope) == "dynamic":
        return round(positions * rope.get("factor", 1.0))
    if _kind(rope) == "yarn" and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or positions
        return max(positions, round(original * rope["factor"]))
    return positions


def extend(config: PretrainedConfig, length: int) -> Scaling:
    """Change ``config`` so that the model takes ``length`` tokens, more than :func:`longest`.

    Raises:
        ConfigError: The model has no rotary embedding, or one whose kind cannot be extended.
    """
    text = config.get_text_config()
    own, rope = longest(config), _flat(text)
    if own is None or rope is None or _kind(rope) not in _REQUIRED:
        kind = "no rotary position embedding" if rope is None else f"a position embedding of kind '{_kind(rope)}'"
        raise ConfigError(
            f"max_seq_length is beyond this model's {own} positions, and it has {kind}, which cannot be extended",
            got=length,
            do=f"Use max_seq_length={own} or less, or another model.",
        )
    return _put(text, *_extended(dict(rope), text.max_position_embeddings, own, length))


def override(config: PretrainedConfig, wanted: Mapping[str, Any]) -> Scaling:
    """Change ``config`` to the scaling that the user asked for (``rope_scaling``), checked first.

    ``original_max_position_embeddings`` and ``rope_theta`` are the model's own unless given.

    Raises:
        ConfigError: An unknown kind or key, a missing key, a factor below 1, or a model without RoPE.
    """
    text = config.get_text_config()
    rope = _flat(text)
    if rope is None:
        raise ConfigError("rope_scaling was given, but this model has no rotary position embedding", got=dict(wanted))
    kind = _validated_kind(wanted)
    positions = text.max_position_embeddings
    original = wanted.get("original_max_position_embeddings") or original_length(config)
    new = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    new |= {key: value for key, value in wanted.items() if key != "type"}
    new["rope_type"] = kind
    new.pop("original_max_position_embeddings", None)
    if kind in ("yarn", "llama3", "longrope"):
        new["original_max_position_embeddings"] = original
    if kind in ("linear", "yarn", "llama3"):
        positions = max(original, round(original * wanted["factor"]))
    elif kind == "dynamic":
        positions = original
    elif kind == "longrope":
        positions = max(positions, round(original * wanted.get("factor", 1.0)))
        _check_lengths(text, new)
    return _put(text, new, positions)


def original_length(config: PretrainedConfig) -> int:
    """The positions that the model was pretrained for, before any scaling, in tokens."""
    text = config.get_text_config()
    rope = _flat(text) or {}
    named = getattr(text, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    if named:
        return int(named)
    positions = int(text.max_position_embeddings)
    return round(positions / rope["factor"]) if _kind(rope) == "linear" else positions


def _extended(rope: dict[str, Any], positions: int, own: int, length: int) -> tuple[dict[str, Any], int]:
    """The parameters and ``max_position_embeddings`` that serve ``length`` tokens instead of ``own``."""
    kind = _kind(rope)
    if kind == "default":
        rope |= {"rope_type": "yarn", "factor": length / own, "original_max_position_embeddings": own}
        return rope, length
    if kind == "dynamic":
        rope["factor"] = length / positions
        return rope, positions
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or positions
        before, rope["factor"] = rope.get("factor") or own / original, length / original
        given = rope.get("attention_factor")
        # Written out by whoever saved it, but the value that follows from the factor: let it follow the new one.
        if given is not None and math.isclose(given, 0.1 * math.log(max(before, 1.0)) + 1, rel_tol=1e-3):
            del rope["attention_factor"]
        return rope, length
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or positions
        rope["long_factor"] = _stretched(rope["long_factor"], own / original, length / own)
        if rope.get("factor"):
            rope["factor"] *= length / own
        return rope, length
    rope["factor"] *= length / own  # linear, llama3
    return rope, length


def _stretched(divisors: list[float], scale: float, ratio: float) -> list[float]:
    """Longrope's divisors for ``scale * ratio`` times the original length instead of ``scale`` times.

    A divisor d becomes d ** (ln(scale * ratio) / ln(scale)): a frequency that was divided by the whole scale is
    divided by the whole new scale, and one that was kept (d = 1) is kept.
    """
    if scale <= 1:
        return [divisor * ratio for divisor in divisors]
    power = math.log(scale * ratio) / math.log(scale)
    return [divisor**power for divisor in divisors]


def _put(text: PretrainedConfig, rope: dict[str, Any], positions: int) -> Scaling:
    rope.pop("type", None)
    parameters = text.rope_parameters
    text.rope_parameters = {**parameters, _FULL_ATTENTION: rope} if _is_nested(parameters) else rope
    text.max_position_embeddings = positions
    return Scaling(copy.deepcopy(text.rope_parameters), positions)


def _flat(text: PretrainedConfig) -> Mapping[str, Any] | None:
    """The parameters of the layers that attend to the whole sequence; None for a model without RoPE."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        return None
    return parameters[_FULL_ATTENTION] if _is_nested(parameters) else parameters


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    return isinstance(parameters.get(_FULL_ATTENTION), Mapping)


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _validated_kind(wanted: Mapping[str, Any]) -> str:
    if not isinstance(wanted, Mapping) or not (wanted.get("rope_type") or wanted.get("type")):
        raise ConfigError(
            "rope_scaling must be a mapping with a rope_type",
            got=wanted,
            do='For example {"rope_type": "yarn", "factor": 4.0}.',
        )
    kind = _kind(wanted)
    if kind not in _REQUIRED:
        raise ConfigError("unknown rope_type in rope_scaling", got=kind, do=f"Known are: {', '.join(_REQUIRED)}.")
    missing = sorted(_REQUIRED[kind] - set(wanted))
    unknown = sorted(set(wanted) - _REQUIRED[kind] - _OPTIONAL.get(kind, set()) - _COMMON)
    if missing or unknown:
        raise ConfigError(
            f"rope_scaling of type '{kind}' needs {', '.join(sorted(_REQUIRED[kind])) or 'no other key'}",
            got=dict(wanted),
            do=f"Add {', '.join(missing)}." if missing else f"Remove {', '.join(unknown)}.",
        )
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        lowest = 1 if key == "factor" else 0
        value = wanted.get(key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value < math.inf:
            raise ConfigError(f"{key} in rope_scaling must be a number of at least {lowest}", got=value)
    if kind == "llama3" and wanted["high_freq_factor"] <= wanted["low_freq_factor"]:
        raise ConfigError("high_freq_factor in rope_scaling must be above low_freq_factor", got=dict(wanted))
    return kind


def _check_lengths(text: PretrainedConfig, rope: Mapping[str, Any]) -> None:
    """Longrope has one divisor for each frequency: half the rotated part of a head."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    expected = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        value = rope[key]
        if not isinstance(value, list) or len(value) != expected:
            got = len(value) if isinstance(value, list) else value
            raise ConfigError(f"{key} in rope_scaling must be a list of {expected} numbers for this model", got=got)
