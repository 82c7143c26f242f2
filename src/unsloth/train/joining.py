"""Short micro-batches of one update computed together: one forward and backward where there would be several.

Gradients of an update are sums over its tokens, divided by their number in the whole update, so how tokens are divided
into passes does not change them. Micro-batches without padding (rows laid end to end, positions that start anew) are
joined by laying them end to end once more. A pass of a few hundred tokens costs a GPU as much time as one of thousands,
since launching its kernels takes longer than computing them.

So that passes of similar lengths can be recorded once and replayed (:mod:`unsloth.layers.block_graphs`), lengths are
rounded up with rows of their own, which no token sees and whose labels are ignored: they add nothing to any sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

MOST_TOKENS = 8192
"""A GPU has enough to do with these."""

_FILLING_ROW = 128
_IGNORED = -100

_NAMES = {"input_ids", "labels", "position_ids"}


def groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours that have at most ``most`` tokens together, in their order; longer ones stay on their own."""
    found: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if found and length <= room:
            found[-1].append(i)
        else:
            found.append([i])
            room = most
        room -= length
    return found


def can_join(batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every batch is rows laid end to end, and nothing else."""
    return all(batch.keys() == _NAMES and batch["input_ids"].shape[0] == 1 for batch in batches)


def join(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """(1, N) ids, labels and positions of all ``batches``; the first label of each is ignored, as in each already."""
    return {name: torch.cat([batch[name] for batch in batches], dim=1) for name in sorted(_NAMES)}


def rounded(tokens: int, long_step: int = 1) -> int:
    """The length that a pass of ``tokens`` is filled up to: an eighth more at most, or 255 tokens of a short one.

    Passes of more than :data:`MOST_TOKENS` become multiples of ``long_step``.
    """
    step = long_step if tokens > MOST_TOKENS else max(256, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def fill(batch: Mapping[str, torch.Tensor], long_step: int = 1) -> dict[str, torch.Tensor]:
    """``batch`` (1, N) with rows of up to 128 tokens behind it that nothing is learned from, to :func:`rounded`."""
    ids = batch["input_ids"]
    missing = rounded(ids.shape[1], long_step) - ids.shape[1]
    if not missing:
        return dict(batch)
    positions = (torch.arange(missing, device=ids.device) % _FILLING_ROW)[None]
    more = {"input_ids": ids[:, :1].expand(1, missing), "labels": ids.new_full((1, missing), _IGNORED)}
    more["position_ids"] = positions
    return {name: torch.cat([batch[name], more[name]], dim=1) for name in sorted(batch)}


class Joined:
    """The micro-batches of an update, with those to be computed together.

    Args:
        batches: All of the update.
        most: Tokens of a pass.
        fills: Whether to round the length of passes up.

    Attributes:
        filled: Tokens that the pass last taken was filled with.
    """

    def __init__(self, batches: Sequence[Mapping[str, torch.Tensor]], most: int, *, fills: bool = False) -> None:
        self._batches = batches  # held, so that their identities stay theirs
        self._passes: dict[int, dict[str, torch.Tensor] | None] = {}
        self._fills, self.filled = fills, 0
        for members in groups([batch["input_ids"].shape[1] for batch in batches], most):
            for i in members[:-1]:
                self._passes[id(batches[i])] = None
            if len(members) > 1:
                self._passes[id(batches[members[-1]])] = join([batches[i] for i in members])

    def take(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
        """What is to be computed when it is the turn of ``batch``; None if a later one brings it along."""
        found = self._passes.pop(id(batch), batch)
        if found is None or not self._fills:
            return found
        filled = fill(found)
        self.filled = filled["input_ids"].shape[1] - found["input_ids"].shape[1]
        return filled
