"""A call of transformers' ``generate`` read as requests to the engine, where it can be.

Whatever is given that the engine does not know is a reason to leave the call to transformers, so that nothing is
ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from unsloth.core.errors import ConfigError
from unsloth.generate.sampling import SamplingParams

_TOP_K = 50  # of transformers, where neither the call nor the model says otherwise

# Settings with a meaning here, or none at all.
_KNOWN = {
    "max_length", "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "num_return_sequences", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache",
    "transformers_version", "compile_config", "disable_compile", "cache_implementation", "cache_config",
    "max_cache_len",
}  # fmt: skip
# Values of other settings that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "length_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
}


@dataclass(frozen=True)
class Call:
    """A call that the engine can answer.

    Attributes:
        input_ids: (B, T) as given, padding included.
        prompts: Its rows without padding.
        params: For all rows; of each row's samples, one request each.
        repeats: Samples a row.
        pad: Token that fills rows up.
        streamer: Told of every token; only with one sequence in all.
    """

    input_ids: torch.Tensor
    prompts: list[list[int]]
    params: SamplingParams
    repeats: int
    pad: int
    streamer: Any


def read(model: PreTrainedModel, args: tuple, kwargs: Mapping[str, Any], longest: int) -> Call | str:
    """The call, or why it is left to transformers.

    Args:
        model: The transformers model.
        args: Of ``generate``, by position.
        kwargs: Likewise, by name.
        longest: Sequence that the engine takes.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    names = ("inputs", "generation_config")
    if len(args) > len(names):
        return "arguments by position"
    given |= {name: value for name, value in zip(names, args, strict=False) if value is not None}
    inputs, ids = given.pop("inputs", None), given.pop("input_ids", None)
    ids = inputs if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        return "no input_ids"
    mask, streamer = given.pop("attention_mask", None), given.pop("streamer", None)
    config = _merged(model, given.pop("generation_config", None))
    unknown = config.update(**given)
    if unknown:
        return f"the argument {sorted(unknown)[0]}"
    reason = _unknown_setting(config)
    if reason is not None:
        return reason
    prompts = _without_padding(ids, mask, config)
    if prompts is None:
        return "an attention mask that is not padding on the left"
    new = _new_tokens(config, ids.shape[1])
    if new is None or ids.shape[1] + new > longest:
        return "no max_new_tokens" if new is None else f"more than {longest} tokens (max_seq_length)"
    repeats = config.num_return_sequences or 1
    if streamer is not None and len(prompts) * repeats != 1:
        return "a streamer for several sequences"
    return _call(config, ids, prompts, new, repeats, streamer)


def _call(
    config: GenerationConfig, ids: torch.Tensor, prompts: list[list[int]], new: int, repeats: int, streamer: Any
) -> Call | str:
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else [int(i) for i in ends]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    sampled: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        top_k = _TOP_K if config.top_k is None else config.top_k
        sampled = {"temperature": _or(config.temperature, 1.0), "top_k": top_k, "top_p": _or(config.top_p, 1.0)}
        sampled["min_p"] = _or(config.min_p, 0.0)
    elif repeats > 1:
        return "several greedy sequences of one prompt"
    try:
        params = SamplingParams(
            **sampled,
            repetition_penalty=_or(config.repetition_penalty, 1.0),
            max_tokens=new,
            min_tokens=_or(config.min_new_tokens, 0),
            ignore_eos=True,
            stop_token_ids=ends,
            detokenize=False,
        )
    except ConfigError:
        return "parameters that are out of range"  # transformers' own message says which
    return Call(ids, prompts, params, repeats, int(pad), streamer)


def _merged(model: PreTrainedModel, given: GenerationConfig | None) -> GenerationConfig:
    """The settings that hold: given ones, then the model's."""
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    own = model.generation_config
    if own is not None:
        for name, value in own.to_dict().items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
    return config


def _unknown_setting(config: GenerationConfig) -> str | None:
    if config.use_cache is False:
        return "use_cache=False"
    for name, value in config.to_dict().items():
        if name in _KNOWN or name.startswith("_") or value is None or value is False or value == 0:
            continue
        if value not in _NEUTRAL.get(name, ()):
            return f"the setting {name}"
    return None


def _without_padding(ids: torch.Tensor, mask: torch.Tensor | None, config: GenerationConfig) -> list[list[int]] | None:
    """The rows without what is masked; None where that is not all on the left."""
    if mask is None:
        pad, ends = config.pad_token_id, config.eos_token_id
        ends = ends if isinstance(ends, list | tuple) else [ends]
        mask = torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()
    if mask.shape != ids.shape or not bool((mask[:, -1] == 1).all()):
        return None
    counts = mask.long().sum(1)
    expected = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - counts)[:, None]
    if not torch.equal(expected, mask.bool()):
        return None
    return [row[len(row) - n :] for row, n in zip(ids.tolist(), counts.tolist(), strict=True)]


def _new_tokens(config: GenerationConfig, given: int) -> int | None:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return None
    return config.max_length - given if config.max_length > given else None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
