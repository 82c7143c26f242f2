"""How far a model is from another one, such as a quantized one from its original, over the tokens of given texts.

For the next-token distributions p of the one and q of the other at a position, the Kullback-Leibler divergence is
sum_v p_v (log p_v - log q_v), in nats. A flip is a position at which the two prefer different tokens (Dutta et al.,
2024, arXiv:2407.09141: accuracy may stay the same where many answers change).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError
from unsloth.data import prepare
from unsloth.data.encode import PrepareOptions
from unsloth.export.predict import Ids, Predictor

_LARGEST_DIFFERENCE = 1024  # rows that one of two vocabularies may be filled up by


@dataclass(frozen=True)
class Divergence:
    """Distance of a model from its original.

    Attributes:
        tokens: Positions compared.
        mean: Mean Kullback-Leibler divergence, in nats.
        median: Median.
        percentile_99_9: The value that one position in a thousand exceeds.
        largest: The largest.
        flips: Share of positions at which the two prefer different tokens.
        base_perplexity: exp of the original's mean loss on the texts.
        perplexity: The same of the other model.
        base_bytes: Size of the original's files.
        nbytes: Size of the other's.
    """

    tokens: int
    mean: float
    median: float
    percentile_99_9: float
    largest: float
    flips: float
    base_perplexity: float
    perplexity: float
    base_bytes: int
    nbytes: int


def divergence(base: Predictor, other: Predictor, sequences: Sequence[Ids]) -> Divergence:
    """Compare two models on sequences of token ids.

    Args:
        base: The original.
        other: What is measured against it.
        sequences: Of at least two tokens each.

    Raises:
        ConfigError: The two have different vocabularies.
        DataError: No sequence.
    """
    if abs(base.vocabulary - other.vocabulary) > _LARGEST_DIFFERENCE:
        raise ConfigError(
            f"'{base.name}' and '{other.name}' have different vocabularies",
            got=f"{base.vocabulary} and {other.vocabulary} tokens",
            do="Compare a model with its own quantized forms.",
        )
    if not sequences:
        raise DataError("no text to compare on")
    size = min(base.vocabulary, other.vocabulary)
    parts = [
        _of_sequence(p[:, :size], q[:, :size], torch.tensor(list(ids)))
        for p, q, ids in zip(base.logits(sequences), other.logits(sequences), sequences, strict=True)
    ]
    kl, flipped, base_loss, loss = (torch.cat(values) for values in zip(*parts, strict=True))
    return Divergence(
        tokens=len(kl),
        mean=kl.mean().item(),
        median=kl.median().item(),
        percentile_99_9=kl.sort().values[min(len(kl) - 1, int(0.999 * len(kl)))].item(),
        largest=kl.max().item(),
        flips=flipped.float().mean().item(),
        base_perplexity=base_loss.mean().exp().item(),
        perplexity=loss.mean().exp().item(),
        base_bytes=base.nbytes,
        nbytes=other.nbytes,
    )


def sequences_of(
    data: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, *, context: int = 512, tokens: int = 8192
) -> list[list[int]]:
    """The first ``tokens`` tokens of a file's rows, as training would see them, in pieces of up to ``context``.

    Args:
        data: A text file, or rows of texts or conversations (then rendered with the chat template).
        tokenizer: Of the models.
        context: Longest sequence.
        tokens: How many in all, at least two.

    Raises:
        DataError: No rows, or an unknown layout.
        TokenizerError: Conversations, and no chat template.
    """
    if tokens < 2:
        raise ConfigError("at least two tokens are needed to compare on", got=tokens)
    rows, _ = prepare.prepare(data, tokenizer, PrepareOptions(max_length=context, long_rows="chunk"))
    found: list[list[int]] = []
    for row in rows:
        ids = row["input_ids"][: tokens - sum(map(len, found))]
        if len(ids) < 2:
            break
        found.append(list(ids))
    return found


def _of_sequence(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Divergence and flip at each position [T]; losses of both models at all but the last [T - 1]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
    following = ids[1:, None]
    losses = (-log[:-1].gather(1, following)[:, 0] for log in (log_p, log_q))
    return kl, p.argmax(-1) != q.argmax(-1), *losses
