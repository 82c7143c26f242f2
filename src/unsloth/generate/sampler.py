"""Drawing the next token of every row.

The distribution is described in :mod:`unsloth.generate.sampling`, the drawing in :mod:`unsloth.kernels.sample_rows`.
What is random is a hash of the request's seed, the number of the token and the column alone, so that a request's tokens
depend on nothing else in the batch.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unsloth.kernels.cut_rows import cut_rows
from unsloth.kernels.sample_rows import sample_rows

_MASK = 0xFFFFFFFF
_OFFSET = np.uint64(0x632BE59BD9B4E019)


@dataclass(frozen=True)
class Kind:
    """What the rows of a batch need, so that the rest is not computed.

    Attributes:
        cuts: Some row has top_k, top_p or min_p.
        penalties: Some row has penalties on tokens so far.
        bias: Some row has biases.
        logprobs: Number of most likely tokens to report; 0 reports the drawn token's rank only, -1 nothing.
    """

    cuts: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int = -1


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


def sample(logits_BV: torch.Tensor, controls: Controls, kind: Kind, fast: bool = True) -> Sampled:
    """Draw a token for every row of logits."""
    adjusted = adjust(logits_BV, controls, kind)
    bound = None
    if kind.cuts:
        c = controls
        bound = cut_rows(adjusted, c.temperature, c.top_k, c.top_p, c.min_p, fast=fast)
    drawn = sample_rows(logits_BV, adjusted, controls.temperature, bound, controls.keys, fast=fast)
    if kind.logprobs < 0:
        return Sampled(*drawn)
    values = logits_BV.float().log_softmax(-1)
    top = values.topk(min(kind.logprobs, values.shape[1]), -1)
    ranks = (values > values.gather(1, drawn[0][:, None])).sum(-1) + 1
    return Sampled(*drawn, ranks, top.values, top.indices)


def adjust(z: torch.Tensor, controls: Controls, kind: Kind) -> torch.Tensor:
    """The logits with biases and penalties, in float32 where there are any."""
    if kind.bias or kind.penalties:
        z = z.float()
    if kind.bias and controls.bias is not None:
        z = z + controls.bias
    if kind.penalties and controls.counts is not None and controls.prompt is not None:
        generated = controls.counts > 0
        r = torch.where(generated | controls.prompt, controls.repetition[:, None], 1.0)
        z = torch.where(z > 0, z / r, z * r)
        z = z - controls.presence[:, None] * generated - controls.frequency[:, None] * controls.counts
    return z


def keys_of(seeds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(2, B) int32 for seeds (B,) and numbers of tokens (B,), both uint64: splitmix64 (Steele et al., 2014)."""
    # The hash of 0 is 0, of which the smallest of all random numbers is made: seed 0 would always draw token 0 first.
    state: Any = _OFFSET + seeds * np.uint64(0x9E3779B97F4A7C15) + numbers * np.uint64(0xD1342543DE82EF95)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
    return np.stack([state & np.uint64(_MASK), state >> np.uint64(32)]).astype(np.uint32).view(np.int32)
