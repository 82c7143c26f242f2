"""Drawing the next token of every row, in plain torch.

The distribution is described in :mod:`unsloth.generate.sampling`. A token is drawn by the exponential race, which needs
no order of the tokens: with u_v uniform, the v with the largest z_v - log(-log(1 - u_v)) is distributed as softmax(z).
u_v is a hash of the request's seed, the number of the token, and v alone, so that a request's tokens depend on nothing
else in the batch, nor on which of the paths below is taken.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1


@dataclass(frozen=True)
class Kind:
    """What the rows of a batch need, so that the rest is not computed.

    Attributes:
        draws: Some row is not greedy.
        cuts: Some row has top_k or top_p.
        min_p: Some row has it.
        penalties: Some row has penalties on tokens so far.
        bias: Some row has biases.
        logprobs: Number of most likely tokens to report.
    """

    draws: bool = False
    cuts: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int = 0


@dataclass(frozen=True)
class Controls:
    """Parameters of the rows, all (B,) unless said otherwise.

    Attributes:
        temperature: float32; 0 is greedy.
        top_p: float32.
        min_p: float32.
        repetition: float32.
        presence: float32.
        frequency: float32.
        top_k: int32; 0 keeps all.
        keys: (2, B) int32, the hash of seed and number of the token.
        counts: (B, V) int32, how often each token was generated; None without penalties.
        prompt: (B, V) bool, tokens of the prompt; likewise.
        bias: (B, V) float32; None without biases.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    top_k: torch.Tensor
    keys: torch.Tensor
    counts: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """The drawn tokens.

    Attributes:
        tokens: (B,) int64.
        sampled: (B,) float32, log-probabilities under the distributions they were drawn from.
        model: (B,) float32, log-probabilities in the plain model.
        ranks: (B,) int64, 1 for the most likely in the plain model; None unless logprobs were asked for.
        top_values: (B, logprobs) float32, of the most likely tokens; None likewise.
        top_ids: (B, logprobs) int64; None likewise.
    """

    tokens: torch.Tensor
    sampled: torch.Tensor
    model: torch.Tensor
    ranks: torch.Tensor | None = None
    top_values: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None


def sample(logits_BV: torch.Tensor, controls: Controls, kind: Kind) -> Sampled:
    """Draw a token for every row of logits."""
    raw = logits_BV.float()
    z = adjust(raw, controls, kind)
    greedy = controls.temperature == 0
    if kind.draws:
        z = z / torch.where(greedy, 1.0, controls.temperature)[:, None]
        z = z.masked_fill(z < threshold(z, controls, kind), float("-inf"))
        race = z - torch.log(exponential(controls.keys, z.shape[1]))
        tokens = torch.where(greedy, z.argmax(-1), race.argmax(-1))
        sampled = z.gather(1, tokens[:, None])[:, 0] - z.logsumexp(-1)
        sampled = sampled.masked_fill(greedy, 0.0)
    else:
        tokens = z.argmax(-1)
        sampled = torch.zeros_like(controls.temperature)
    model = raw.gather(1, tokens[:, None]) - raw.logsumexp(-1, keepdim=True)
    if not kind.logprobs:
        return Sampled(tokens, sampled, model[:, 0])
    values = raw - raw.logsumexp(-1, keepdim=True)
    top = values.topk(kind.logprobs, -1)
    ranks = (values > model).sum(-1) + 1
    return Sampled(tokens, sampled, model[:, 0], ranks, top.values, top.indices)


def adjust(z: torch.Tensor, controls: Controls, kind: Kind) -> torch.Tensor:
    """Biases and penalties."""
    if kind.bias and controls.bias is not None:
        z = z + controls.bias
    if kind.penalties and controls.counts is not None and controls.prompt is not None:
        generated = controls.counts > 0
        r = torch.where(generated | controls.prompt, controls.repetition[:, None], 1.0)
        z = torch.where(z > 0, z / r, z * r)
        z = z - controls.presence[:, None] * generated - controls.frequency[:, None] * controls.counts
    return z


def threshold(z: torch.Tensor, controls: Controls, kind: Kind) -> torch.Tensor:
    """(B, 1): logits below it are left out by top_k, top_p and min_p, in this order.

    Every one of them keeps the largest, so together they keep those above a bound; of equal ones all.
    """
    bound = torch.full_like(z[:, :1], float("-inf"))
    if kind.cuts:
        ordered = z.sort(-1, descending=True).values
        size = z.shape[1]
        k = torch.where(controls.top_k > 0, controls.top_k.clamp(max=size), size).long()[:, None]
        kth = ordered.gather(1, k - 1)
        ordered = ordered.masked_fill(ordered < kth, float("-inf"))
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        kept = ((before < controls.top_p[:, None]) & (ordered > float("-inf"))).sum(-1, keepdim=True)
        bound = ordered.gather(1, (kept - 1).clamp(min=0))
    if kind.min_p:
        lowest = z.amax(-1, keepdim=True) + torch.log(controls.min_p)[:, None]
        bound = torch.maximum(bound, lowest)
    return bound


def exponential(keys: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size) float32: exponentially distributed, a function of the row's keys and the column alone."""
    column = torch.arange(size, device=keys.device)
    first, second = (key.long()[:, None] & _MASK for key in keys)
    bits = _mix((column * _GOLDEN + first) & _MASK)
    bits = _mix(bits ^ second)
    u = (bits.float() + 1) * 2.0**-32
    # 1 - u would round away what matters most, the smallest u, whose columns win
    return torch.where(u < 0.00390625, u * (1 + u * (0.5 + u / 3)), -torch.log(1 - u.clamp(max=1 - 2.0**-24)))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers that spreads every bit over all (the finalizer of MurmurHash3)."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & _MASK
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)


def keys_of(seed: int, number: int) -> tuple[int, int]:
    """Two signed 32-bit numbers for a seed and the number of a token: splitmix64 (Steele et al., 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + number * 0xD1342543DE82EF95) & (2**64 - 1)
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    state ^= state >> 31
    low, high = state & _MASK, state >> 32
    return low - 2**32 * (low >> 31), high - 2**32 * (high >> 31)
