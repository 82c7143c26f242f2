"""The rows of a batch end to end, without padding, and with what two of them begin with only once.

For attention that tells documents and their branches by positions (:mod:`unsloth.layers.packed_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Legend: R rows of a batch, T tokens of the longest, N tokens of all rows together, without padding.


@dataclass(frozen=True)
class PackedRows:
    """A batch as one row.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), each row's from 0, or from where it parts from the row that it shares its beginning with.
        index: (R, T), where in the N each token of the batch is; 0 for padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    index: torch.Tensor


def pack(ids: torch.Tensor, attended: torch.Tensor, prompts: torch.Tensor | None = None) -> PackedRows:
    """Lay rows end to end; makes a GPU wait once.

    Args:
        ids: (R, T) token ids.
        attended: (R, T), not 0 where a token is no padding.
        prompts: (R, T), true for tokens that rows i and R/2 + i may share: as many as both begin with are kept once.
            None shares nothing.
    """
    here = attended.bool()
    position = here.cumsum(1) - 1
    skipped = position.new_zeros(len(ids))
    if prompts is not None:
        ones, others = (part.chunk(2) for part in (ids, here & prompts))
        same = (ones[0] == ones[1]) & others[0] & others[1]
        skipped = torch.cat([torch.zeros_like(skipped).chunk(2)[0], same.cumprod(1).sum(1)])
    own = here & (position >= skipped[:, None])
    counts = own.sum(1)
    starts = _starts(counts, in_pairs=prompts is not None)
    shared = position < skipped[:, None]
    index = torch.where(shared, starts.roll(len(ids) // 2)[:, None], (starts - skipped)[:, None]) + position
    total = int(counts.sum())
    target = torch.where(own, index, total).flatten()
    flat_ids, flat_positions = (
        values.new_zeros(total + 1).scatter_(0, target, values.flatten())[None, :total] for values in (ids, position)
    )
    return PackedRows(flat_ids, flat_positions, index.masked_fill(~here, 0))


def _starts(counts: torch.Tensor, in_pairs: bool) -> torch.Tensor:
    """Where each of the R rows starts; in pairs, rows i and R/2 + i are neighbours."""
    ordered = counts.view(2, -1).t().flatten() if in_pairs else counts
    starts = ordered.cumsum(0) - ordered
    return starts.view(-1, 2).t().flatten() if in_pairs else starts
