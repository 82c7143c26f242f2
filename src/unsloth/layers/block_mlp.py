"""The MLP half of a block that is one function: norm, gate and up, down and the residual stream, in tiles of rows.

    y = h + down(a(gate(n)) up(n))        n = n2(h)

The MLP's inner values are seven times as wide as its input, and one tile of them at a time is all that exists, unless
they are kept for the backward. Products with 2,048 rows or more are as fast as larger ones. Mathematics as in
:mod:`unsloth.kernels.lora_mlp`. Shapes: M tokens, K hidden features, I features of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from unsloth.kernels.append_projection import append_projection
from unsloth.kernels.glu_adapters import glu_forward
from unsloth.kernels.lora_mlp import GateUpKept, down_gradients, gate_up_gradients
from unsloth.kernels.lora_weights import LoraGroup
from unsloth.layers.direct import glu_gradients, norm
from unsloth.layers.norm import NormOptions
from unsloth.layers.own_gradients import OwnGradients
from unsloth.layers.site import Site


@dataclass(frozen=True, slots=True)
class MlpParts:
    """What one call computes with.

    Attributes:
        weight: (K,) of n2.
        options: Of n2.
        gate_up: Gate and up.
        down: The third.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        tile: Most rows whose inner values exist at a time, where they are not kept.
        dtype: Of products; the residual stream may be float32 where they are not.
    """

    weight: torch.Tensor
    options: NormOptions
    gate_up: Site
    down: Site
    activation: str
    tile: int
    dtype: torch.dtype


@dataclass(slots=True)
class MlpInner:
    """What the backward reads beside h and h A_d^T, if it was kept.

    Attributes:
        t_gu: (M, columns) n A^T of gate and up.
        gated: (M, 2 I + room) gate and up.
    """

    t_gu: torch.Tensor
    gated: torch.Tensor


def mlp_forward(
    parts: MlpParts,
    added: torch.Tensor,
    residual: torch.Tensor,
    *,
    keep: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MlpInner | None]:
    """(y, h = residual + added, h A_d^T, what else was kept); y is written into ``out`` if that is given."""
    group, dtype = parts.gate_up.group(added.dtype), added.dtype
    wide, h = _normed(parts, group, added, residual)
    rows, features = h.shape[0], sum(group.outs) // 2
    inner = MlpInner(tail_of(wide, group), added.new_empty(0)) if keep else None
    if inner is not None:
        inner.t_gu = apart(inner.t_gu, group)
        inner.gated = added.new_empty(rows, 2 * features)
    tiles = list(_tiles(rows, rows if keep else parts.tile))
    y, t_d, down = torch.empty_like(h) if out is None else out, [], None
    for i, part in enumerate(tiles):
        gated = _gated(group, wide[part], None if inner is None else inner.gated)
        if i + 1 == len(tiles):
            del group, wide  # a dequantized weight, before the next one is made
        if down is None:
            down = parts.down.group(dtype)
        inside = gated.new_empty(gated.shape[0], features + down.room)
        tail = tail_of(inside, down)
        t_d.append(glu_forward(gated, parts.activation, down.a, inside[:, :features], tail))
        del gated
        down.add_forward(h[part], inside, tail, out=y[part])
        del inside, tail
    return y, h, t_d[0] if len(t_d) == 1 else torch.cat(t_d), inner


def mlp_gradients(
    parts: MlpParts,
    h: torch.Tensor,
    t_d: torch.Tensor,
    inner: MlpInner | None,
    grad: torch.Tensor,
    needs: Sequence[bool],
    own: OwnGradients | None = None,
    number: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """(dn (M, K), dA and dB of gate, up and down in float32); ``inner.gated`` is overwritten.

    Args:
        parts: As in the forward.
        h: (M, K).
        t_d: (M, columns).
        inner: What the forward kept, if it did.
        grad: (M, K) of y, of the products' dtype.
        needs: Whether each A and B wants a gradient.
        own: Takes in the gradients of the weights themselves, where they are trained.
        number: Of gate among the block's linear layers; up and down follow.
    """
    needs, dtype = (True, *needs), parts.dtype
    tiles = list(_tiles(h.shape[0], h.shape[0] if inner is not None else parts.tile))
    dn, total = h.new_empty(0), list[torch.Tensor | None]()
    group, down, kept, wide = None, None, None, None
    for part in tiles:
        down = parts.down.group(dtype, again=False) if down is None else down
        dh, below = down_gradients(down, t_d[part], grad[part], needs[6])
        if len(tiles) == 1:
            down = None  # a dequantized weight, before the next one is made
        if group is None or kept is None or wide is None:
            group, wide, kept = _gate_up(parts, h, inner)
            dn = grad.new_empty(h.shape[0], h.shape[1] + group.room)
        gated = _gated(group, wide[part], None) if inner is None else kept.gated
        piece = GateUpKept(kept.x[part], kept.t_gu[part], gated)
        del gated
        if own is None:
            _, found = gate_up_gradients(
                group, piece, dh, below, parts.activation, needs[:5], overwrite=True, out=dn[part]
            )
        else:
            found = [None] * 6
            glu_gradients(dh, piece.gated, parts.activation)
            grads = [piece.gated[:, columns] for columns in group.out_slices()]
            group.input_gradient(grads, below.p[:, :0], out=dn[part])
            for i, (g, x) in enumerate([(grads[0], piece.x), (grads[1], piece.x), (grad[part], dh)]):
                own.add_linear(number + i, g, x, tiles=len(tiles))
            del grads, g, x
        del dh, below, piece
        total = _sum(total, found)
    return dn[:, : h.shape[1]], total


def _gate_up(parts: MlpParts, h: torch.Tensor, inner: MlpInner | None) -> tuple[LoraGroup, torch.Tensor, GateUpKept]:
    """The group of gate and up, its input, and what its backward reads: gate and up themselves only if kept."""
    group = parts.gate_up.group(parts.dtype, again=False)
    if inner is None:
        wide, _ = _normed(parts, group, h, None)
        return group, wide, GateUpKept(wide[:, : h.shape[1]], tail_of(wide, group), h.new_empty(0))
    n = torch.empty_like(h, dtype=parts.dtype)
    norm(h, parts.weight, parts.options, n)
    return group, n, GateUpKept(n, inner.t_gu, inner.gated)


def _normed(
    parts: MlpParts, group: LoraGroup, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([n | n A^T] (M, K + room), what was normalized)."""
    features = x.shape[1]
    wide = x.new_empty(x.shape[0], features + (group.room or group.columns), dtype=parts.dtype)
    h = norm(x, parts.weight, parts.options, wide[:, :features], residual)
    if group.columns:
        append_projection(wide[:, :features], group.a.t(), wide[:, features:])
    return wide, h


def _gated(group: LoraGroup, wide: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """(rows, 2 I) gate and up."""
    features = group.in_features
    gated = wide.new_empty(wide.shape[0], sum(group.outs)) if into is None else into
    x = wide if group.room else wide[:, :features]
    return group.forward(x, wide[:, features:], [None, None], out=gated)


def _tiles(rows: int, most: int) -> Iterator[slice]:
    """Equal parts of ``rows``, of at most ``most`` each."""
    count = max(1, -(-rows // most))
    size = max(1, -(-rows // count))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def _sum(total: list[torch.Tensor | None], found: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    if not total:
        return found
    for so_far, more in zip(total, found, strict=True):
        if so_far is not None and more is not None:
            so_far.add_(more)
    return total


def tail_of(wide: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """Where projections go: behind the features of ``wide``, or on their own where it has no more columns."""
    if wide.shape[1] > group.in_features or not group.columns:
        return wide[:, group.in_features :]
    return wide.new_empty(wide.shape[0], group.columns)


def apart(tail: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """Projections that outlive the wide buffer they are a part of."""
    return tail.clone() if group.columns else tail
