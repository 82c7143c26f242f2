"""Products of 16-bit matrices with the few rows of a decoding step, several of one input in one launch.

    y_i = x W_i^T + s_i (m * t_i) B_i^T             or, of a gated unit, act(y_0) * y_1

with t_i = x A_i^T made before, see :mod:`unsloth.kernels.decoding_linears`. Such a product takes as long as reading W.
A product of its own for each matrix leaves the device idle at each start and end, and adapters added afterwards read
and write every output once more. Here all tiles of all matrices are one grid, and the adapters' parts are added before
the results are rounded. K is split over programs where N alone gives too few; a launch of its own then adds the parts.

W is the left operand, so that its rows fill the matrix units however few rows x has. x comes from L2: every tile of W
reads all of it, which is why more rows of x want larger tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.kernels.dispatch import (
    can_launch,
    capability,
    early_launch,
    interpreting,
    launch_on,
    overlaps_launches,
    processor_count,
    shared_memory,
)
from unsloth.kernels.glu import activate
from unsloth.kernels.joined_products import (
    MOST_MATRICES,
    LowRank,
    add_parts,
    find_matrix,
    low_rank_tile,
    mask_arguments,
    pick,
    pick_pointer,
    side_arguments,
    side_switches,
    split_rows,
)
from unsloth.kernels.rounding import must_round, nearest

MOST_ROWS = 128


def takes_dense(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether :func:`multiply_dense` can take ``x`` [M, K] and these matrices: up to three, all of one 16-bit dtype."""
    half = x.dtype == torch.float16 or (
        x.dtype == torch.bfloat16 and (interpreting() or capability(x.device) >= (8, 0))
    )
    alike = all(
        w.dtype == x.dtype and w.shape[1] == x.shape[1] and w.is_contiguous() and w.data_ptr() % 16 == 0
        for w in weights
    )
    rows = 0 < x.shape[0] <= MOST_ROWS and x.stride(1) == 1 and len(weights) <= MOST_MATRICES
    return rows and half and alike and x.shape[1] % 64 == 0 and can_launch(x, *weights)


class DenseShape(NamedTuple):
    """How :func:`multiply_dense` cuts its work.

    Attributes:
        batch: Rows of x in a tile.
        tile: Rows of W in a tile; of a gated unit, rows of each matrix.
        step: Columns in a step, which K must be a multiple of.
        split: Parts that K is split into.
        warps: Of a program.
        stages: Of loads.
    """

    batch: int
    tile: int
    step: int
    split: int
    warps: int
    stages: int


def dense_shape(rows: int, sizes: Sequence[int], k: int, processors: int, room: int, gated: bool = False) -> DenseShape:
    """The shape of :func:`multiply_dense`; ``room`` is the shared memory that one program may have.

    Timed on an H100: few programs that load far ahead, and no more parts of K than a multiprocessor each needs. Four
    warps hold the sums of 64 x 128 or 128 x 32; with 128 x 128 the compiler lets their products wait for each other.
    """
    small, many = room < 96 * 2**10, sum(sizes) >= 16384
    batch = max(16, min(32 if small else 128, triton.next_power_of_2(rows)))
    tile = 128 if gated or (many and not small) else 64  # rows of W that a program reads
    warps = 8 if tile == 128 and batch > 32 else 4
    step = 128 if k % 128 == 0 and not small and (many or batch <= 32) else 64
    if room < 3 * 2 * step * (tile + batch):
        step = 64
    tiles, split = sum(triton.cdiv(n, tile) for n in sizes) * triton.cdiv(rows, batch), 1
    wanted = processors * (3 if batch > 32 else 2) // 4
    while not gated and split < 8 and tiles * split < wanted and k // step >= 8 * split:
        split *= 2
    share = room // 2 if tile == 64 and tiles * split > processors else room  # of a multiprocessor's shared memory
    stages = max(2, min(8, (share - 8 * 2**10) // (2 * step * (tile + batch))))
    return DenseShape(batch, tile // 2 if gated else tile, step, split, warps, stages)


def multiply_dense(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    side: LowRank | None = None,
    activation: str = "",
    shape: DenseShape | None = None,
) -> list[torch.Tensor]:
    """``x @ W.T`` for each of ``weights``, which :func:`takes_dense` accepts.

    Args:
        x: [M, K].
        weights: The matrices [N_i, K].
        side: Added before the results are rounded, or None. What made its projections must be the kernel that was
            launched last, for the product waits for it only where it adds them.
        activation: One of :data:`unsloth.kernels.glu.ACTIVATIONS`: of two matrices of one shape, ``act(y_0) * y_1`` is
            given; or "".
        shape: Overrides :func:`dense_shape`.

    Returns:
        [M, N_i] of each, contiguous; one where there is an activation.
    """
    rows, k = x.shape
    gated = bool(activation)
    sizes = [weight.shape[0] for weight in weights]
    room, processors = shared_memory(x.device), processor_count(x.device)
    batch, tile, step, split, warps, stages = shape or dense_shape(rows, sizes, k, processors, room, gated)
    outs = sizes[:1] if gated else sizes
    width = 0 if side is None else side.rank
    y = torch.empty((split, rows * sum(outs)), dtype=x.dtype if split == 1 else torch.float32, device=x.device)
    overlaps = overlaps_launches(x.device)
    with launch_on(x):
        dense_rows_kernel[(sum(triton.cdiv(n, tile) for n in outs), triton.cdiv(rows, batch), split)](
            x, tuple(weights), y, rows, tuple(sizes), rows * sum(outs), k, triton.cdiv(k // step, split),
            x.stride(0), *side_arguments(side), *mask_arguments(side), width, COUNT=len(weights),
            **side_switches(side), GATED=gated, ACTIVATION=activation, PLAIN=interpreting(), ROUND=must_round(x.dtype),
            EARLY=overlaps, LATE=side is not None, BATCH=batch, ROWS=tile, STEP=step, CHUNK=16 if width % 32 else 32,
            STAGES=stages, num_warps=warps,
            **early_launch(overlaps),
        )  # fmt: skip
    return split_rows(y[0] if split == 1 else add_parts(y, x.dtype), rows, outs)


@triton.jit(do_not_specialize=["m", "share", "adapters"])  # one compilation for every number of rows
def dense_rows_kernel(  # noqa: C901  its switches are compile-time constants
    x, weights, y, m, sizes, outputs, k, share, stride_x, projections, ranks, first_rank, side_b, side_scales, mask,
    adapters, width, COUNT: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PLAIN: tl.constexpr, ROUND: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes a tile [ROWS, BATCH] of one share of K, counted in steps; y is [shares, outputs].

    PARTS: of the side's projections, 0 without one. EARLY: the kernel ahead may still be at work; LATE: it makes the
    projections alone, not x.
    """
    MATRICES: tl.constexpr = 1 if GATED else COUNT  # that the grid goes through
    which, before, rows_before = find_matrix(tl.program_id(0), sizes, ROWS, MATRICES)
    n, tile_row = pick(which, sizes, MATRICES), (tl.program_id(0) - before) * ROWS
    row = tl.minimum(tile_row + tl.arange(0, ROWS), n - 1)
    batch = tl.minimum(tl.program_id(1) * BATCH + tl.arange(0, BATCH), m - 1)
    start = tl.minimum(tl.program_id(2) * share, k // STEP)
    stop = tl.minimum(start + share, k // STEP)
    column = tl.arange(0, STEP)
    from_first = tile_row.to(tl.int64) * k
    w_at = pick_pointer(which, weights, MATRICES) + from_first + ((row - tile_row) * k)[:, None] + column[None, :]
    x_at = x + batch[None, :] * stride_x + column[:, None]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    second = total
    if GATED:
        w2_at = weights[1] + from_first + ((row - tile_row) * k)[:, None] + column[None, :]
    if EARLY and not LATE:
        gdc_wait()
    for step in tl.range(start, stop, num_stages=STAGES):
        w, v = tl.load(w_at + step * STEP), tl.load(x_at + step * STEP)
        if PLAIN:
            w, v = w.to(tl.float32), v.to(tl.float32)
        total = tl.dot(w, v, total, input_precision="ieee")
        if GATED:
            w2 = tl.load(w2_at + step * STEP)
            if PLAIN:
                w2 = w2.to(tl.float32)
            second = tl.dot(w2, v, second, input_precision="ieee")
    if PARTS:
        if EARLY and LATE:
            gdc_wait()
        if tl.program_id(2) == 0:
            b, first = pick_pointer(which, side_b, MATRICES), first_rank + which * width
            part = low_rank_tile(
                row, batch, m, projections, ranks, first, b, width, mask, adapters, PARTS, MASKED, PLAIN, ROUND, CHUNK
            )
            total += part * pick(which, side_scales, MATRICES)
            if GATED:
                part = low_rank_tile(
                    row, batch, m, projections, ranks, first + width, side_b[1], width, mask, adapters, PARTS, MASKED,
                    PLAIN, ROUND, CHUNK,
                )  # fmt: skip
                second += part * side_scales[1]
    if GATED:
        gate, _ = activate(total, ACTIVATION)
        total = gate * second
    if EARLY:
        gdc_launch_dependents()
    row = tile_row + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    out = tl.program_id(2).to(tl.int64) * outputs + rows_before * m + batch[None, :] * n + row[:, None]
    total = nearest(total, ROUND).to(y.dtype.element_ty)
    tl.store(y + out, total, (batch[None, :] < m) & (row[:, None] < n))


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    ptr, examples = f"*{float_dtype}", []
    room = 2**18 if float_dtype == "bf16" else 2**16
    integers = ("outputs", "k", "stride_x", "ranks", "first_rank", "width")
    for rows, count, masked, activation in ((32, 3, True, ""), (128, 2, False, "silu"), (128, 1, False, "")):
        batch, tile, step, _, warps, stages = dense_shape(rows, [14336], 4096, 132, room, bool(activation))
        types: dict = {"x": ptr, "weights": (ptr,) * count, "y": ptr, "mask": ptr, "projections": "*fp32"}
        types |= dict.fromkeys(integers, "i32:16") | dict.fromkeys(("m", "share", "adapters"), "i32")
        types |= {"sizes": ("i32",) * count, "side_b": (ptr,) * count, "side_scales": ("fp32",) * count}
        shape = {"COUNT": count, "PARTS": 2, "MASKED": masked, "GATED": bool(activation), "ACTIVATION": activation}
        shape |= {"PLAIN": False}
        shape |= {"ROUND": False, "EARLY": False, "LATE": False, "BATCH": batch, "ROWS": tile, "STEP": step}
        shape |= {"CHUNK": 32, "STAGES": stages}
        examples.append((dense_rows_kernel, types, shape, {"num_warps": warps}))
    return examples
