"""How many bytes a block that is one function keeps, computes again and holds at once: what its memory policy asks.

Counted from the shapes in :mod:`unsloth.layers.whole_block` and :mod:`unsloth.layers.block_mlp`; change them together.
"""

from __future__ import annotations

from collections.abc import Sequence

from unsloth.kernels.lora_weights import padded_rank
from unsloth.layers.linear import Frozen
from unsloth.memory.arena import aligned
from unsloth.memory.budget import LayerSizes

TILE = 4096
"""Rows of the MLP whose inner values exist at a time; fewer make its products slower."""
LEAN_TILE = 2048
"""The same where memory is short."""


def block_sizes(
    rows: int, width: int, heads: tuple[int, int, int], linears: Sequence[Frozen], itemsize: int
) -> LayerSizes:
    """Bytes for a batch of ``rows`` tokens.

    Args:
        rows: M.
        width: K.
        heads: (H, Hk, D).
        linears: Projections, output, gate, up and down.
        itemsize: Bytes of a value.
    """
    *qkv, output, gate, up, down = linears
    inner = down.base.in_features
    attended, projected = heads[0] * heads[2], (heads[0] + 2 * heads[1]) * heads[2]
    thin = [_columns(group) for group in (qkv, [output], [gate, up], [down])]
    tile = min(rows, LEAN_TILE)
    weights = (2 * inner + thin[2]) * (width + thin[2]) + (width + thin[3]) * (inner + thin[3])
    again = rows * (projected + width + sum(thin[:3]))
    return LayerSizes(
        least=aligned(rows * width * itemsize) + aligned(rows * attended * itemsize),
        fixed=rows * (heads[0] * 4 + thin[3] * itemsize),
        rest=(again + rows * (2 * inner + thin[2])) * itemsize,
        working=(again + tile * (3 * inner + thin[2]) + weights + 4 * rows * width) * itemsize,
    )


def _columns(group: Sequence[Frozen]) -> int:
    return padded_rank(sum(0 if linear.adapter is None else linear.adapter.rank for linear in group))
