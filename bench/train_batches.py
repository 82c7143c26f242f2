"""Batches of random tokens for bench/train.py: rows of one length, or of the spread of an instruction data set."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unsloth.train import joining

Batch = dict[str, torch.Tensor]
_IGNORED = -100
_ROW_BUDGET = 8192


@dataclass(frozen=True)
class Case:
    """What one update is computed from.

    Attributes:
        batch: Rows of a micro-batch.
        tokens: Of a row; 0 for the spread of :func:`spread`.
        accumulate: Micro-batches.
        cap: GiB that torch's allocator may take; 0 for all.
    """

    batch: int
    tokens: int
    accumulate: int
    cap: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Case:
        """``2x2048x4``, ``8xspreadx8``, or ``1x80000x1@24``."""
        shape, _, cap = text.partition("@")
        batch, tokens, accumulate = shape.split("x")
        return cls(int(batch), 0 if tokens == "spread" else int(tokens), int(accumulate), float(cap or 0))

    def __str__(self) -> str:
        cap = f"@{self.cap:g}" if self.cap else ""
        return f"{self.batch}x{self.tokens or 'spread'}x{self.accumulate}{cap}"

    @property
    def is_long(self) -> bool:
        """Whether one update takes so long that one is measured, and nothing else is looked at."""
        return self.tokens > 32768

    def lengths(self, seed: int) -> list[int]:
        """Tokens of each row of an update."""
        count = self.batch * self.accumulate
        return [self.tokens] * count if self.tokens else spread(count, seed)


def spread(count: int, seed: int) -> list[int]:
    """Lengths as those of the rows of Alpaca with its prompt: log-normal, median 95, mean about 115, 30 to 1,024."""
    draw = random.Random(seed)
    return [min(1024, max(30, round(math.exp(draw.gauss(math.log(95), 0.6))))) for _ in range(count)]


def rows(case: Case, vocabulary: int, seed: int) -> list[torch.Tensor]:
    """Token ids of the rows of an update, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocabulary, (length,), generator=generator) for length in case.lengths(seed)]


def batches(case: Case, vocabulary: int, seed: int, device: torch.device, *, packed: bool) -> list[Batch]:
    """The micro-batches of an update.

    Args:
        case: Which.
        vocabulary: Ids are below it.
        seed: Of ids and lengths.
        device: Where to.
        packed: Whether rows of unequal length follow each other without padding, as many as fit into 8,192 tokens,
            instead of being padded to the longest of each ``case.batch``.
    """
    made = rows(case, vocabulary, seed)
    if case.tokens:
        ids = torch.stack(made).view(case.accumulate, case.batch, case.tokens).to(device)
        return [{"input_ids": part, "labels": part} for part in ids]
    groups = _packs(made) if packed else [made[i : i + case.batch] for i in range(0, len(made), case.batch)]
    return [{k: v.to(device) for k, v in (_joined(g) if packed else _padded(g)).items()} for g in groups]


def _packs(made: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    packs: list[list[torch.Tensor]] = [[]]
    for row in made:
        if packs[-1] and sum(map(len, packs[-1])) + len(row) > _ROW_BUDGET:
            packs.append([])
        packs[-1].append(row)
    return packs


def _joined(group: Sequence[torch.Tensor]) -> Batch:
    """(1, tokens), filled up as by our trainer: positions begin anew with each row, whose first token none predicts."""
    ids = torch.cat(list(group))[None]
    positions = torch.cat([torch.arange(len(row)) for row in group])[None]
    labels = ids.masked_fill(positions == 0, _IGNORED)
    return joining.fill({"input_ids": ids, "labels": labels, "position_ids": positions})


def _padded(group: Sequence[torch.Tensor]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True)
    lengths = torch.tensor([len(row) for row in group])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, _IGNORED), "attention_mask": mask.long()}
