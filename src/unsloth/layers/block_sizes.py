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
GROUP_ROWS = 8192
"""Rows from whose double on the gradients of attention are made for some heads at a time, where memory is short."""
MOST_GROUPS = 4
"""Of heads; one of them still has work for a whole GPU."""
RECORDED_ROWS = 8192
"""Blocks of more rows keep a GPU busy without being recorded as graphs, and their buffers would be large."""


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
    again = rows * (projected + width + sum(thin[:2]))
    of_mlp = (2 * inner + thin[2]) * (width + thin[2]), (width + thin[3]) * (inner + thin[3])
    of_attention = (projected + thin[0]) * (width + thin[0]) + (width + thin[1]) * (attended + thin[1])

    def mlp(tile: int) -> int:
        """While the MLP's gradients are made: three values of the width of its input, and a tile of its inner ones."""
        return again + rows * (4 * width + thin[2]) + min(tile, rows) * (3 * inner + thin[2] + width) + sum(of_mlp)

    def scores(groups: int) -> int:
        """While attention's are: of its output, of q, k and v, and inside it q's in float32, keys' for every head."""
        outside = projected + sum(thin[:2]) + 2 * width + attended + projected
        heads_at_once = -(-heads[1] // groups) * (heads[0] // heads[1])
        return rows * outside + rows * heads_at_once * heads[2] * (4 + 2 * itemsize) // itemsize

    # gradients of the block's own weights, all of them at the end; sums over tiles are wider
    own = sum(linear.base.weight.numel() for linear in linears if linear.trained)
    recorded = rows <= RECORDED_ROWS and not own
    kept = again + rows * (3 * width + inner + thin[2]) + max(of_mlp)
    lean = max(mlp(LEAN_TILE), scores(head_groups(rows, heads[1]))) + own * (1 if rows <= LEAN_TILE else 2)
    quick = max(mlp(TILE) + rows * width, scores(1)) + of_attention + own * (1 if rows <= TILE else 2)
    return LayerSizes(
        least=aligned(rows * width * itemsize) + aligned(rows * attended * itemsize),
        fixed=rows * (heads[0] * 4 + thin[3] * itemsize),
        rest=(again + rows * (2 * inner + 2 * thin[2])) * itemsize,
        working=lean * itemsize,
        quick=max(0, quick - lean) * itemsize,
        keeping=max(0, kept - lean - again) * itemsize,
        weights=(sum(of_mlp) + of_attention) * itemsize if all(linear.quantized for linear in linears) else 0,
        buffers=rows * (2 * width + attended) * itemsize if recorded else 0,
    )


def head_groups(rows: int, key_heads: int) -> int:
    """In how many groups of heads the gradients of attention are made where memory is short."""
    return max(1, min(key_heads, MOST_GROUPS, rows // GROUP_ROWS))


def _columns(group: Sequence[Frozen]) -> int:
    return padded_rank(sum(0 if linear.adapter is None else linear.adapter.rank for linear in group))
