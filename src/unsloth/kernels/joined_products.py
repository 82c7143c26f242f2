"""What kernels share that multiply one input with several matrices in one launch, adapters included.

Their grids go through the tiles of all matrices, whose outputs lie one after the other. Where K is split over programs,
:func:`add_parts` adds what they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.kernels.dispatch import (
    early_launch,
    launch_on,
    overlaps_launches,
)
from unsloth.kernels.rounding import must_round, nearest

MOST_MATRICES = 3


@dataclass(frozen=True)
class LowRank:
    """What is added to products with several matrices: ``scales[i] * (mask * t_i) @ b[i].T``.

    Attributes:
        projections: float32 [parts, M, R]; [t_0, t_1, ...] is their sum over the parts, from column ``first`` on.
        first: See there.
        b: [N_i, r] of x's dtype, contiguous, of one r, a multiple of 16.
        scales: Their factors.
        mask: (M, adapters) of x's dtype, contiguous, 1 where the row has the adapter, else 0; each adapter's
            columns of t_i, r / adapters of them, are side by side. None: every row has every one.
    """

    projections: torch.Tensor
    first: int
    b: Sequence[torch.Tensor]
    scales: Sequence[float]
    mask: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank r of each adapter."""
        return self.b[0].shape[1]


def side_arguments(side: LowRank | None) -> tuple:
    """The kernels' arguments of ``side``: projections, their columns, the first of them, the B, their scales."""
    if side is None:
        return None, 0, 0, (), ()
    return side.projections, side.projections.shape[2], side.first, tuple(side.b), tuple(side.scales)


def mask_arguments(side: LowRank | None) -> tuple:
    """Two more, for kernels that know masks: the mask, and how many adapters it has."""
    mask = None if side is None else side.mask
    return mask, 1 if mask is None else mask.shape[1]


def side_switches(side: LowRank | None) -> dict[str, int]:
    """The same kernels' constants: parts of the projections, 0 without a side, and whether there is a mask."""
    if side is None:
        return {"PARTS": 0, "MASKED": False}
    return {"PARTS": side.projections.shape[0], "MASKED": side.mask is not None}


def split_rows(y: torch.Tensor, rows: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The matrices [rows, n] that lie in ``y`` one after the other."""
    parts = y.split([rows * n for n in sizes])
    return [part.view(rows, n) for part, n in zip(parts, sizes, strict=True)]


def add_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of float32 ``parts`` [P, ...] over P, rounded once, in one launch."""
    y = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    early = overlaps_launches(parts.device)
    with launch_on(parts):
        add_parts_kernel[(triton.cdiv(y.numel(), 1024),)](
            parts, y, y.numel(), PARTS=parts.shape[0], ROUND=must_round(dtype), EARLY=early, BLOCK=1024, num_warps=4,
            **early_launch(early),
        )  # fmt: skip
    return y


@triton.jit
def pick(which, values, COUNT: tl.constexpr):
    """``values[which]``."""
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(which == i, values[i], found)
    return found


@triton.jit
def pick_pointer(which, pointers, COUNT: tl.constexpr):
    """``pointers[which]``, for pointers to 16 aligned bytes."""
    if COUNT == 1:
        return pointers[0]
    else:
        address = pointers[0].to(tl.int64)
        for i in tl.static_range(1, COUNT):
            address = tl.where(which == i, pointers[i].to(tl.int64), address)
        return tl.multiple_of(address.to(pointers[0].dtype), 16)


@triton.jit
def find_matrix(tile, sizes, TILE: tl.constexpr, COUNT: tl.constexpr):
    """Which matrix a tile of all matrices' rows is of, that matrix' first tile, and the rows before it."""
    which, first, before, end, rows = 0, 0, 0, 0, 0
    for i in tl.static_range(COUNT - 1):
        end += tl.cdiv(sizes[i], TILE)
        rows += sizes[i]
        later = tile >= end
        which = tl.where(later, i + 1, which)
        first = tl.where(later, end, first)
        before = tl.where(later, rows, before)
    return which, first, before


@triton.jit
def low_rank_tile(
    row, batch, m, projections, ranks, first, b, width, mask, adapters, PARTS: tl.constexpr, MASKED: tl.constexpr,
    PLAIN: tl.constexpr, ROUND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile (rows of b, rows of x) of ``b (m * t)^T``; ``first`` is t's first column in the projections."""
    total = tl.zeros((row.shape[0], batch.shape[0]), tl.float32)
    for start in tl.range(0, width, CHUNK, num_stages=1):
        rank = start + tl.arange(0, CHUNK)
        at = projections + (batch * ranks + first)[None, :] + rank[:, None]
        t = tl.zeros((CHUNK, batch.shape[0]), tl.float32)
        for i in tl.static_range(PARTS):
            t += tl.load(at + i * (m * ranks))
        if MASKED:
            own = tl.load(mask + (batch * adapters)[None, :] + (rank // (width // adapters))[:, None])
            t = t * own.to(tl.float32)
        t = nearest(t, ROUND).to(b.dtype.element_ty)
        left = tl.load(b + (row * width)[:, None] + rank[None, :])
        if PLAIN:
            left, t = left.to(tl.float32), t.to(tl.float32)
        total = tl.dot(left, t, total, input_precision="ieee")
    return total


@triton.jit
def add_parts_kernel(
    parts, y, size, PARTS: tl.constexpr, ROUND: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program adds BLOCK entries."""
    if EARLY:
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + at, at < size, other=0.0)
    tl.store(y + at, nearest(total, ROUND).to(y.dtype.element_ty), at < size)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"parts": "*fp32", "y": f"*{float_dtype}", "size": "i32"}
    shape = {"PARTS": 4, "ROUND": False, "EARLY": False, "BLOCK": 1024}
    return [(add_parts_kernel, signature, shape, {"num_warps": 4})]
