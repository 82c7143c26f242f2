"""The rows of a batch end to end, without padding, and with what several of them begin with only once.

For attention that tells documents and their branches by positions (:mod:`unsloth.layers.packed_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth.train import joining

_LONG_STEP = 128
"""Kernels are compiled once for lengths that 16 divides, and once more for others."""

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


def pack(
    ids: torch.Tensor,
    attended: torch.Tensor,
    prompts: torch.Tensor | None = None,
    leaders: torch.Tensor | None = None,
) -> PackedRows:
    """Lay rows end to end; makes a GPU wait once.

    Args:
        ids: (R, T) token ids.
        attended: (R, T), not 0 where a token is no padding.
        prompts: (R, T), true for tokens that rows may share with their leader: as many as both begin with are kept
            once. None shares nothing.
        leaders: (R,), the row that each row may share its beginning with, itself for one that leads. None means
            pairs: row i leads row R/2 + i.
    """
    here = attended.bool()
    position = here.cumsum(1) - 1
    own_number = torch.arange(len(ids), device=ids.device)
    skipped = position.new_zeros(len(ids))
    if prompts is None:
        leaders = own_number
    else:
        leaders = own_number % (len(ids) // 2) if leaders is None else leaders
        shareable = here & prompts
        same = (ids == ids[leaders]) & shareable & shareable[leaders]
        apart = torch.where(here, ~same, here[leaders])  # also where one of the two has padding
        skipped = (here & (apart.cumsum(1) == 0)).sum(1).masked_fill(leaders == own_number, 0)
    own = here & (position >= skipped[:, None])
    starts = _starts(own.sum(1), leaders, skipped)
    shared = position < skipped[:, None]
    index = torch.where(shared, starts[leaders][:, None], (starts - skipped)[:, None]) + position
    total = int(own.sum())
    target = torch.where(own, index, total).flatten()
    flat_ids, flat_positions = (
        values.new_zeros(total + 1).scatter_(0, target, values.flatten())[None, :total] for values in (ids, position)
    )
    return PackedRows(flat_ids, flat_positions, index.masked_fill(~here, 0))


def filled(rows: PackedRows) -> PackedRows:
    """``rows`` with others behind them that no token sees, so that passes of similar length are of the same."""
    names = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
    return PackedRows(**joining.fill(names, _LONG_STEP), index=rows.index)


def filled_length(tokens: int) -> int:
    """Of :func:`filled`, for rows of so many tokens together."""
    return joining.rounded(tokens, _LONG_STEP)


def _starts(counts: torch.Tensor, leaders: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """Where each of the R rows starts: after its leader those that branch off it, then those that share nothing.

    A row that shares nothing starts a document, and what branches off belongs to the document started last.
    """
    leads = leaders == torch.arange(len(leaders), device=leaders.device)
    order = torch.argsort(3 * leaders + torch.where(leads, 0, torch.where(skipped > 0, 1, 2)), stable=True)
    ordered = counts[order]
    return torch.empty_like(counts).scatter_(0, order, ordered.cumsum(0) - ordered)
