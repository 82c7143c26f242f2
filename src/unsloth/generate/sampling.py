"""How the tokens of a request are chosen.

With the model's logits z of one position and the tokens of the request so far, in this order (transformers' order of
logits processors; penalties on generated tokens as in the OpenAI interface)::

    z_v += logit_bias_v
    z_v  = z_v / r if z_v > 0 else z_v * r           v in the prompt or generated, r = repetition_penalty
    z_v -= presence_penalty * [count_v > 0] + frequency_penalty * count_v            count of generated tokens
    z_v  = -inf                                      v ends the request, and fewer than min_tokens are generated
    z    = z / temperature
    keep the top_k largest; then the fewest whose probabilities sum to top_p; then those of at least
    min_p times the largest probability

A token is drawn from the softmax of what is left (at temperature 0: the largest before the division).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsloth.core.errors import ConfigError

_SEEDS = 2**63
_LARGEST, _LARGEST_BIAS = 1000, 1e9  # beyond, float32 would lose what they are applied to


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request, under vLLM's names.

    Attributes:
        n: Completions of the prompt; they share its keys and values.
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Share of the probability that is kept, the most probable tokens first; 1 keeps all.
        top_k: Number of tokens that are kept; 0 or -1 keeps all.
        min_p: Tokens below this share of the largest probability are left out.
        repetition_penalty: Above 1, tokens of the prompt and of the completion become less likely.
        presence_penalty: Subtracted from the logits of tokens that the completion has.
        frequency_penalty: Subtracted once for each time that the completion has them.
        logit_bias: Added to the logits of these token ids.
        seed: Of this request; the same seed gives the same tokens whatever else runs. None: a new one.
        stop: Texts that end a completion.
        stop_token_ids: Tokens that end a completion, besides the model's own.
        include_stop_str_in_output: Whether ``text`` keeps the stop text.
        ignore_eos: Do not end at the model's end-of-sequence tokens.
        max_tokens: Longest completion; None goes to the end of the context.
        min_tokens: No token ends a completion before it has this many.
        logprobs: Report the log-probabilities, in the plain model, of this many most likely tokens at every position.
        skip_special_tokens: Leave special tokens out of ``text``.
        detokenize: Whether there is to be a ``text``; without it, no stop texts.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_shape(self)
        _check_penalties(self)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(text, str) or not text for text in stops):
            raise ConfigError("stop must be texts, none of them empty", got=self.stop, do='For example stop=["###"].')
        if stops and not self.detokenize:
            raise ConfigError("stop texts need detokenize=True", got=stops, do="Use stop_token_ids, or detokenize.")
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            ids = _ids("logit_bias", [int(key) for key in self.logit_bias])
            object.__setattr__(self, "logit_bias", dict(zip(ids, self.logit_bias.values(), strict=True)))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
# Fields of vLLM's class that change what is generated and that this engine lacks: their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words": (None, []),
    "prompt_logprobs": (None,),
    "logits_processors": (None, []),
    "guided_decoding": (None,),
    "structured_outputs": (None,),
    "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
}


def accept(given: Any) -> SamplingParams:
    """Our parameters from ours, from vLLM's (by its attributes), from a mapping, or from None (the defaults).

    Raises:
        ConfigError: It is none of these, or sets what this engine cannot do.
    """
    if given is None:
        return SamplingParams()
    if isinstance(given, SamplingParams):
        return given
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(_FIELDS))
        if unknown:
            raise ConfigError("unknown sampling parameters", got=unknown, do=f"Known are: {', '.join(_FIELDS)}.")
        return SamplingParams(**given)
    if not hasattr(given, "temperature") or not hasattr(given, "max_tokens"):
        raise ConfigError(
            "sampling_params must be SamplingParams", got=type(given).__name__, do="Import it from unsloth."
        )
    for name, neutral in _NEUTRAL.items():
        if getattr(given, name, None) not in neutral:
            raise ConfigError(f"the engine does not know {name}", got=getattr(given, name), do="Leave it out.")
    return SamplingParams(**{name: getattr(given, name, default) for name, default in _FIELDS.items()})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_counts(p: SamplingParams) -> None:
    limits = {"n": 1, "top_k": -1, "min_tokens": 0}
    optional = {"max_tokens": 1, "logprobs": 0, "seed": -_SEEDS}
    for name, least in {**limits, **optional}.items():
        value = getattr(p, name)
        if not _whole(value, least) and not (name in optional and value is None):
            raise ConfigError(f"{name} must be a whole number of at least {least}", got=value)
    if p.seed is not None and p.seed >= 2 * _SEEDS:
        raise ConfigError("seed must fit 64 bits", got=p.seed)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise ConfigError(
            "min_tokens is more than max_tokens", got=(p.min_tokens, p.max_tokens), do="Lower one or raise the other."
        )


def _check_shape(p: SamplingParams) -> None:
    if not _number(p.temperature) or not 0 <= p.temperature <= _LARGEST:
        raise ConfigError(
            f"temperature must be a number of at least 0 and at most {_LARGEST}", got=p.temperature, do="0 is greedy."
        )
    if not _number(p.top_p) or not 0 < p.top_p <= 1:
        raise ConfigError("top_p must be above 0 and at most 1", got=p.top_p, do="1 keeps every token.")
    if not _number(p.min_p) or not 0 <= p.min_p <= 1:
        raise ConfigError("min_p must be from 0 to 1", got=p.min_p, do="0 keeps every token.")
    if p.greedy and p.n > 1:
        raise ConfigError(
            "n greedy completions are all the same",
            got=f"n={p.n}, temperature={p.temperature}",
            do="Raise temperature.",
        )


def _check_penalties(p: SamplingParams) -> None:
    if not _number(p.repetition_penalty) or not 1 / _LARGEST <= p.repetition_penalty <= _LARGEST:
        raise ConfigError(
            f"repetition_penalty must be above 0, from {1 / _LARGEST} to {_LARGEST}",
            got=p.repetition_penalty,
            do="1 is none.",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not _number(getattr(p, name)) or not -2 <= getattr(p, name) <= 2:
            raise ConfigError(f"{name} must be from -2 to 2", got=getattr(p, name), do="0 is none.")
    if p.logit_bias is None:
        return
    if not isinstance(p.logit_bias, Mapping):
        raise ConfigError("logit_bias must map token ids to numbers", got=p.logit_bias, do="For example {42: -5.0}.")
    for token, value in p.logit_bias.items():
        if not _number(value) or abs(value) > _LARGEST_BIAS:
            raise ConfigError(
                f"logit_bias must map token ids to numbers within {_LARGEST_BIAS:,.0f}",
                got={token: value},
                do="For example {42: -5.0}.",
            )


def _ids(name: str, values: Iterable[Any] | None) -> tuple[int, ...]:
    ids = tuple(values or ())
    if not all(_whole(value, 0) for value in ids):
        raise ConfigError(f"{name} must be token ids", got=ids)
    return ids
