"""``y = x @ W.T`` with a 4-bit W that is decoded on the way, for the few rows of a decoding step.

    y[m, n] = sum over k of x[m, k] * code[nibble[n, k]] * scale[n, k // blocksize]

With 16-bit activations, on cards with bfloat16 products, up to 8 rows of x (16 where a program has less than 160 KiB of
shared memory) go through the kernel of :mod:`unsloth.kernels.nf4_fragments`. Elsewhere up to :data:`MATVEC_ROWS` rows
go through a matrix-vector kernel: values are decoded to float32 and multiplied there (with 16-bit activations, to
within 2^-13 of a block's largest value), so nothing else is rounded before the output.

Up to :data:`FUSED_ROWS` rows go through a kernel of tiles, which multiplies values, rounded to x's dtype, with x on the
matrix units, a block of 64 columns at a time, and the sums with the block's scale in float32. It splits K over programs
where N alone gives too few. Where there is room for a table of pairs of values in shared memory, each thread looks up
the values that the matrix units want from it, so nothing moves between threads; x's columns are put in the matching
order before, by a launch of their own. Beyond that many rows, and wherever a gradient is needed, W is dequantized
first.

The layout of W is described in :mod:`unsloth.kernels.nf4`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import (
    as_rows,
    can_launch,
    capability,
    check_tensors,
    early_launch,
    interpreting,
    launch_on,
    overlaps_launches,
    processor_count,
    shared_memory,
)
from unsloth.kernels.joined_products import (
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
from unsloth.kernels.nf4 import (
    NF4Weight,
    assembly,
    block_scales,
    decode_words,
    dequantize_nf4,
    exact_look_up,
    interleave_eight,
    lane_table,
    scale_arguments,
    scale_signature,
)
from unsloth.kernels.nf4_fragments import (
    fill_nested,
    fill_table,
    group_arguments,
    group_signature,
    multiply_fragments,
    takes_fragments,
)
from unsloth.kernels.rounding import must_round

MATVEC_ROWS = 4
FUSED_ROWS = 128


def nf4_linear(x: torch.Tensor, weight: NF4Weight, *, fast: bool = True) -> torch.Tensor:
    """Multiply the rows of ``x`` by a 4-bit matrix.

    Args:
        x: Floating-point tensor of shape [..., K].
        weight: Quantized matrix [N, K].
        fast: False takes the plain-torch reference.

    Returns:
        Tensor [..., N] of x's dtype. Differentiable in x.
    """
    n, k = weight.shape
    check_tensors("nf4_linear", x=x)
    if x.dim() == 0 or x.shape[-1] != k or x.device != weight.packed.device:
        do = f"Pass [..., {k}] on {weight.packed.device}."
        raise ConfigError("nf4_linear: x does not fit the weight", got=(tuple(x.shape), str(x.device)), do=do)
    if not fast:
        return nf4_linear_reference(x, weight)
    rows = x.numel() // max(k, 1)
    wanted = torch.is_grad_enabled() and x.requires_grad
    words = weight.words()
    fits = k % 64 == 0 and weight.blocksize >= 64 and words is not None and rows and n
    if wanted or not fits or rows > FUSED_ROWS or not can_launch(x):
        return nf4_linear_reference(x, weight) if not can_launch(x) else x @ dequantize_nf4(weight, dtype=x.dtype).T
    matrix = as_rows(x.detach())
    multiply = product_kernel(matrix, [weight])
    if rows <= MATVEC_ROWS and multiply is not multiply_fragments:
        y = _matvec(matrix, weight, words)
    elif multiply is not None:
        (y,) = multiply(matrix, [weight])
    else:
        y = matrix @ dequantize_nf4(weight, dtype=x.dtype).T
    return y.view(*x.shape[:-1], n)


def nf4_linear_reference(x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
    """The formula in plain torch: W is dequantized to x's dtype, then multiplied."""
    return x @ dequantize_nf4(weight, dtype=x.dtype, fast=False).T


def look_up(weight: NF4Weight, dtype: torch.dtype) -> str:
    """How values are looked up, see :func:`unsloth.kernels.nf4.decode_words`."""
    mixed = weight.quant_type == "nf4" and dtype in (torch.float16, torch.bfloat16) and not interpreting()
    return "mixed" if mixed else exact_look_up()


def matvec_shape(rows: int, n: int, k: int) -> tuple[int, int, int]:
    """Rows of W in a tile, blocks of 64 columns in a tile, warps."""
    columns = triton.next_power_of_2(k // 64)
    if n <= 2048:
        return 4, min(64 if rows == 1 else 32, columns), 4
    return (8, min(32, columns), 4) if rows == 1 and n < 8192 else (16, min(16, columns), 4)


class TileShape(NamedTuple):
    """How :func:`multiply_tiles` cuts its work.

    Attributes:
        batch: Rows of x in a tile.
        tile: Rows of W in a tile.
        blocks: Blocks of 64 columns in a step.
        split: Parts that K is split into.
        warps: Of a program.
        stages: Of loads.
    """

    batch: int
    tile: int
    blocks: int
    split: int
    warps: int
    stages: int


def tile_shape(rows: int, sizes: Sequence[int], k: int, processors: int, room: int) -> TileShape:
    """The shape of :func:`multiply_tiles` for so many rows of x.

    Every tile of W reads all of x, so more rows of x want larger tiles. ``room`` is :func:`shared_memory`; 64 KiB hold
    32 rows of x. With the table, which takes 32 KiB of its own, the pipeline's part must be more than 48 KiB, for only
    then does Triton ask for more than that in all.
    """
    small, table = room < 96 * 2**10, takes_table(room)
    batch = max(32 if table else 16, min(32 if small else 128, triton.next_power_of_2(rows)))
    if table:  # two programs to a multiprocessor
        tile, blocks, warps, stages = {32: (128, 2, 8, 4), 64: (64, 1, 4, 6), 128: (64, 1, 4, 4)}[batch]
    else:
        tile, blocks, warps, stages = 64, 1, 4, 2 if small else 3
    tiles, split = sum(triton.cdiv(n, tile) for n in sizes) * triton.cdiv(rows, batch), 1
    wanted = processors * 6 // 5 if table or batch > 32 else 2 * processors
    while split < 8 and tiles * split < wanted and k // 64 >= 8 * split:
        split *= 2
    return TileShape(batch, tile, blocks, split, warps, stages)


def takes_table(room: int) -> bool:
    """Whether values are looked up in a table in shared memory, see :func:`decode_tile`."""
    return room >= 160 * 2**10


def _matvec(x: torch.Tensor, weight: NF4Weight, words: torch.Tensor) -> torch.Tensor:
    rows, (n, k) = x.shape[0], weight.shape
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    tile, blocks, warps = matvec_shape(rows, n, k)
    with launch_on(x):
        nf4_matvec_kernel[(triton.cdiv(n, tile),)](
            x, words, *scale_arguments(weight), y, n, k // 64, x.stride(0), y.stride(0), BATCH=rows,
            BLOCKSIZE=weight.blocksize, NESTED=weight.nested, NESTED_BLOCKSIZE=weight.nested_blocksize,
            LOOK_UP=look_up(weight, x.dtype), ROWS=tile, BLOCKS=blocks, num_warps=warps,
        )  # fmt: skip
    return y


def product_kernel(x: torch.Tensor, weights: Sequence[NF4Weight]) -> Callable[..., list[torch.Tensor]] | None:
    """:func:`multiply_fragments` or :func:`multiply_tiles`, whichever is faster for x [M, K], or None."""
    few = x.shape[0] <= 8 or not takes_table(shared_memory(x.device))
    if few and all(takes_fragments(x, weight) for weight in weights):
        return multiply_fragments
    return multiply_tiles if all(takes_tiles(x, weight) for weight in weights) else None


def takes_tiles(x: torch.Tensor, weight: NF4Weight) -> bool:
    """Whether :func:`multiply_tiles` can take ``x`` [M, K]: at most :data:`FUSED_ROWS` rows of a 16-bit dtype."""
    whole = weight.shape[1] % 64 == 0 and weight.blocksize >= 64 and weight.words() is not None
    half = x.dtype == torch.float16 or (
        x.dtype == torch.bfloat16 and (interpreting() or capability(x.device) >= (8, 0))
    )
    return half and whole and 0 < x.shape[0] <= FUSED_ROWS and x.stride(1) == 1 and can_launch(x)


def multiply_tiles(
    x: torch.Tensor,
    weights: Sequence[NF4Weight],
    *,
    side: LowRank | None = None,
    arranged: torch.Tensor | None = None,
    shape: TileShape | None = None,
) -> list[torch.Tensor]:
    """``x @ W.T`` for each of ``weights``, which :func:`launch_together` and :func:`takes_tiles` accept.

    Args:
        x: [M, K].
        weights: The quantized matrices [N_i, K].
        side: Added before the results are rounded, or None.
        arranged: What :func:`arrange_for_tiles` gave for x before the kernel ran that made the side's projections,
            for which alone the product then waits; None calls it.
        shape: Overrides :func:`tile_shape`.

    Returns:
        [M, N_i] of each, contiguous.
    """
    rows, k = x.shape
    sizes = [weight.shape[0] for weight in weights]
    room = shared_memory(x.device)
    table = takes_table(room)
    x = arrange_for_tiles(x) if arranged is None else arranged
    batch, tile, blocks, split, warps, stages = shape or tile_shape(rows, sizes, k, processor_count(x.device), room)
    stages += table and capability(x.device) < (9, 0)  # where the pipeline holds one step less
    tiles = sum(triton.cdiv(n, tile) for n in sizes)
    y = torch.empty((split, rows * sum(sizes)), dtype=x.dtype if split == 1 else torch.float32, device=x.device)
    overlaps = overlaps_launches(x.device)
    late = side is not None and (arranged is not None or not table)
    with launch_on(x):
        nf4_matmul_kernel[(tiles, triton.cdiv(rows, batch), split)](
            x, tuple(weight.words() for weight in weights), *group_arguments(weights), y, rows, tuple(sizes),
            rows * sum(sizes), k // 64, triton.cdiv(k // 64, split), x.stride(0), *side_arguments(side),
            *mask_arguments(side), COUNT=len(weights), RANK=0 if side is None else side.rank, **side_switches(side),
            ROUND=must_round(x.dtype), BLOCKSIZE=weights[0].blocksize, NESTED=weights[0].nested,
            NESTED_BLOCKSIZE=weights[0].nested_blocksize, PLAIN=interpreting(),
            LOOK_UP="table" if table else look_up(weights[0], x.dtype), EARLY=overlaps, LATE=late, BATCH=batch,
            ROWS=tile, BLOCKS=blocks, STAGES=stages, WARPS=warps, num_warps=warps,
            **early_launch(overlaps),
        )  # fmt: skip
    return split_rows(y[0] if split == 1 else add_parts(y, x.dtype), rows, sizes)


def arrange_for_tiles(x: torch.Tensor) -> torch.Tensor:
    """``x`` as :func:`multiply_tiles` reads it: a copy by :func:`arrange` where values are looked up in a table."""
    return arrange(x) if takes_table(shared_memory(x.device)) else x


def arrange(x: torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] of a 16-bit dtype, K a multiple of 64, with the columns of each 64 in another order.

    With a column's place in W, (word, byte, nibble), the bytes come first in the new order, then the words:
    ``x.view(M, K // 64, 8, 4, 2).transpose(2, 3)``.
    """
    (rows, k), early = x.shape, overlaps_launches(x.device)
    if x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    y = torch.empty((rows, k), dtype=x.dtype, device=x.device)
    with launch_on(x):
        arrange_kernel[(rows, triton.cdiv(k, 2048))](
            x.view(torch.int32), y.view(torch.int32), k // 2, x.stride(0) // 2, EARLY=early, BLOCK=1024, num_warps=4,
            **early_launch(early),
        )  # fmt: skip
    return y


def _pairs_of_word() -> tl.constexpr:
    """Pairs of values of a word's bytes, lowest first, from the table of :func:`fill_table`."""
    lines = [".reg .b32 base, copy;", "mov.u32 base, nf4_pairs;", "mov.u32 copy, %laneid;"]
    lines.append("mad.lo.u32 base, copy, 4, base;")
    for i in range(4):
        lines += [f"prmt.b32 ${i}, $4, 0, {0x4440 + i};", f"mad.lo.u32 ${i}, ${i}, 128, base;"]
        lines.append(f"ld.shared.b32 ${i}, [${i}];")
    return assembly(*lines)


PAIRS_OF_WORD = _pairs_of_word()
NESTED_ENTRY = assembly(
    ".reg .b32 at;", "mov.u32 at, nf4_scales;", "mad.lo.u32 at, $1, 4, at;", "ld.shared.f32 $0, [at];"
)
LOAD_BYTE = assembly("ld.global.nc.u8 $0, [$1];")
LOAD_FLOAT = assembly("ld.global.nc.f32 $0, [$1];")


@triton.jit
def load_eight(x, row, stride_x, first, end, BLOCKS: tl.constexpr):
    """Columns ``first`` onwards of a row of x as eight tensors [1, BLOCKS, 8], one for each value of a word."""
    place = first + tl.arange(0, BLOCKS * 64)
    v = tl.load(x + row * stride_x + place, place < end, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(v, [1, BLOCKS, 8, 2, 2, 2]))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def dot_eight(w, v, LOOK_UP: tl.constexpr):
    """Sum over a word's eight values of weight times activation, without what decode_words added to the first four."""
    total = (
        w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3] + w[4] * v[4] + w[5] * v[5] + w[6] * v[6] + w[7] * v[7]
    )
    if LOOK_UP == "mixed":
        total = total - 3.0 * (v[0] + v[1] + v[2] + v[3])
    return total


@triton.jit
def store_sums(y, total, n, ROWS: tl.constexpr):
    """Sum a tile [ROWS, BLOCKS, 8] over its columns, and store the result at the tile's place in one row of y."""
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + out, tl.sum(tl.sum(total, 2), 1).to(y.dtype.element_ty), out < n)


@triton.jit
def nf4_matvec_kernel(  # noqa: C901  one branch a row of x
    x, words, code, absmax, nested_code, nested_absmax, offset, y, n, k_blocks, stride_x, stride_y,
    BATCH: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    LOOK_UP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program computes ROWS outputs for each of BATCH (at most 4) rows of x.

    The words are loaded last: the compiler then keeps their layout (four words a thread) for the products, and moves
    the few values of x between threads instead of the many of W.
    """
    table = lane_table(code, LOOK_UP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    part = tl.arange(0, BLOCKS)[None, :, None]
    inner = tl.arange(0, 8)[None, None, :]
    total0 = tl.zeros((ROWS, BLOCKS, 8), tl.float32)
    total1 = tl.zeros((ROWS, BLOCKS, 8), tl.float32)
    total2 = tl.zeros((ROWS, BLOCKS, 8), tl.float32)
    total3 = tl.zeros((ROWS, BLOCKS, 8), tl.float32)
    for start in range(0, k_blocks, BLOCKS):
        x0 = load_eight(x, 0, stride_x, start * 64, k_blocks * 64, BLOCKS)
        if BATCH > 1:
            x1 = load_eight(x, 1, stride_x, start * 64, k_blocks * 64, BLOCKS)
        if BATCH > 2:
            x2 = load_eight(x, 2, stride_x, start * 64, k_blocks * 64, BLOCKS)
        if BATCH > 3:
            x3 = load_eight(x, 3, stride_x, start * 64, k_blocks * 64, BLOCKS)
        mask = (row < n) & (start + part < k_blocks)
        block = row * k_blocks + start + part
        scale = block_scales(
            block // (BLOCKSIZE // 64), mask, absmax, nested_code, nested_absmax, offset, NESTED, NESTED_BLOCKSIZE
        )
        packed = tl.load(words + block * 8 + inner, mask, other=0)
        w = decode_words(packed, code, table, LOOK_UP)
        total0 += scale * dot_eight(w, x0, LOOK_UP)
        if BATCH > 1:
            total1 += scale * dot_eight(w, x1, LOOK_UP)
        if BATCH > 2:
            total2 += scale * dot_eight(w, x2, LOOK_UP)
        if BATCH > 3:
            total3 += scale * dot_eight(w, x3, LOOK_UP)
    store_sums(y, total0, n, ROWS)
    if BATCH > 1:
        store_sums(y + stride_y, total1, n, ROWS)
    if BATCH > 2:
        store_sums(y + 2 * stride_y, total2, n, ROWS)
    if BATCH > 3:
        store_sums(y + 3 * stride_y, total3, n, ROWS)


@triton.jit
def load_from(base, at, BYTE: tl.constexpr, PLAIN: tl.constexpr):
    """Entries ``at`` of uint8 (as int32) or float32 numbers.

    Written as an instruction, since the compiler would give a load the layout that suits memory, and then move what it
    loads to the threads that need it through shared memory, with two barriers in every step.
    """
    if PLAIN:
        return tl.load(base + at).to(tl.int32) if BYTE else tl.load(base + at)
    elif BYTE:
        return tl.inline_asm_elementwise(
            LOAD_BYTE, "=r,l", [base.to(tl.int64) + at], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            LOAD_FLOAT, "=f,l", [base.to(tl.int64) + at.to(tl.int64) * 4], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def decode_tile(words, code, dtype: tl.constexpr, LOOK_UP: tl.constexpr, table):
    """Values [R, 64] of words [R, 8], without their scales, rounded to ``dtype``.

    With LOOK_UP "table" their order is that of :func:`arrange`: a thread then decodes the very words whose values the
    matrix units expect from it, and nothing moves between threads.
    """
    if LOOK_UP == "table":
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            PAIRS_OF_WORD, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
        even = tl.join(both_halves(p0, dtype), both_halves(p2, dtype))
        odd = tl.join(both_halves(p1, dtype), both_halves(p3, dtype))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 3, 4, 1, 2)), [words.shape[0], 64])
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = decode_words(words, code, table, LOOK_UP)
        if LOOK_UP == "mixed":  # decode_words added 3 to the first four
            v0, v1, v2, v3 = v0 - 3.0, v1 - 3.0, v2 - 3.0, v3 - 3.0
        return tl.reshape(interleave_eight(v0, v1, v2, v3, v4, v5, v6, v7), [words.shape[0], 64]).to(dtype)


@triton.jit
def both_halves(pair, dtype: tl.constexpr):
    """The two 16-bit values of each int32, along a new last dimension."""
    low = pair.to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (pair >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def load_scale_parts(
    block, absmax, nested_absmax, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PLAIN: tl.constexpr
):  # fmt: skip
    """What the scales of blocks are made of: codes and nested scales (or nothing and scales)."""
    if NESTED:
        index = load_from(absmax, block, True, PLAIN)
        return index, load_from(nested_absmax, block // NESTED_BLOCKSIZE, False, PLAIN)
    else:
        return 0, load_from(absmax, block, False, PLAIN)


@triton.jit(do_not_specialize=["m", "part_blocks", "adapters"])  # one compilation for every number of rows
def nf4_matmul_kernel(  # noqa: C901  its switches are compile-time constants
    x, words, code, absmax, nested_codes, nested_absmax, offsets, y, m, sizes, outputs, k_blocks, part_blocks,
    stride_x, projections, ranks, first_rank, side_b, side_scales, mask, adapters, COUNT: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, ROUND: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PLAIN: tl.constexpr, LOOK_UP: tl.constexpr,
    EARLY: tl.constexpr, LATE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program computes a tile [ROWS, BATCH] of one part of the sum over K; y is [parts, outputs].

    A step is BLOCKS blocks of 64 columns. What their scales are made of is loaded a step before, so that no step waits
    for memory; words and x come by the pipeline. A block past the part's end counts as zeros of x. EARLY: the kernel
    ahead may still be at work; LATE: it makes the projections alone, not x.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    which, before, rows_before = find_matrix(tl.program_id(0), sizes, ROWS, COUNT)
    n, tile_row = pick(which, sizes, COUNT), (tl.program_id(0) - before) * ROWS
    absmax, nested_absmax_of, nested_code = pick_pointer(which, absmax, COUNT), nested_absmax[0], nested_codes[0]
    if NESTED:
        nested_absmax_of = pick_pointer(which, nested_absmax, COUNT)
        nested_code = pick_pointer(which, nested_codes, COUNT)
    row = tl.minimum(tile_row + tl.arange(0, ROWS), n - 1)
    batch = tl.minimum(tl.program_id(1) * BATCH + tl.arange(0, BATCH), m - 1)
    start = tl.minimum(tl.program_id(2) * part_blocks, k_blocks)
    stop = tl.minimum(start + part_blocks, k_blocks)
    ratio: tl.constexpr = BLOCKSIZE // 64
    first, last = row * k_blocks, k_blocks - 1
    w_at = pick_pointer(which, words, COUNT) + (row * (k_blocks * 8))[:, None] + tl.arange(0, 8)[None, :]
    x_at = x + batch[None, :].to(tl.int64) * stride_x + tl.arange(0, 64)[:, None]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    waiting = tl.tuple(())
    for i in tl.static_range(BLOCKS):
        at = (first + tl.minimum(start + i, last)) // ratio
        waiting = waiting + load_scale_parts(at, absmax, nested_absmax_of, NESTED, NESTED_BLOCKSIZE, PLAIN)
    shift = 0.0
    if NESTED:
        shift = tl.load(pick_pointer(which, offsets, COUNT))
    table = 0.0
    if LOOK_UP == "table":
        fill_table(code, dtype == tl.float16, 32 * WARPS)
        if NESTED:
            fill_nested((nested_code,), 32 * WARPS, 1)
        tl.debug_barrier()
    else:
        table = lane_table(code, LOOK_UP)
    if EARLY and not LATE:
        gdc_wait()
    for step in tl.range(start, stop, BLOCKS, num_stages=STAGES):
        packed, activations, scales, following = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(())
        for i in tl.static_range(BLOCKS):
            packed = packed + (tl.load(w_at + tl.minimum(step + i, last) * 8),)
            if BLOCKS == 1:
                activations = activations + (tl.load(x_at + step * 64),)
            else:
                inside = tl.full((1, 1), step + i, tl.int32) < stop
                activations = activations + (tl.load(x_at + tl.minimum(step + i, last) * 64, inside, other=0.0),)
        for i in tl.static_range(BLOCKS):
            scale = waiting[2 * i + 1]
            if NESTED:
                scale = nested_entry(waiting[2 * i], nested_code, LOOK_UP, PLAIN) * scale + shift
            scales = scales + (scale,)
            at = (first + tl.minimum(step + BLOCKS + i, last)) // ratio
            following = following + load_scale_parts(at, absmax, nested_absmax_of, NESTED, NESTED_BLOCKSIZE, PLAIN)
        waiting = following
        tile = decode_tile(packed[0], code, dtype, LOOK_UP, table)
        for i in tl.static_range(BLOCKS):
            if PLAIN:
                part = tl.dot(tile.to(tl.float32), activations[i].to(tl.float32))
            else:
                part = tl.dot(tile, activations[i])
            if i + 1 < BLOCKS:  # while the matrix units are at work
                tile = decode_tile(packed[i + 1], code, dtype, LOOK_UP, table)
            total += part * scales[i][:, None]
    if RANK:
        if EARLY and LATE:
            gdc_wait()
        b = pick_pointer(which, side_b, COUNT)
        part = low_rank_tile(
            row, batch, m, projections, ranks, first_rank + which * RANK, b, RANK, mask, adapters, PARTS,
            MASKED, PLAIN, ROUND, 16 if RANK % 32 else 32,
        )  # fmt: skip
        total += part * tl.where(tl.program_id(2) == 0, pick(which, side_scales, COUNT), 0.0)
    if EARLY:
        gdc_launch_dependents()
    row = tile_row + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    out = tl.program_id(2).to(tl.int64) * outputs + rows_before * m + batch[None, :] * n + row[:, None]
    tl.store(y + out, total.to(y.dtype.element_ty), (batch[None, :] < m) & (row[:, None] < n))


@triton.jit
def nested_entry(index, nested_code, LOOK_UP: tl.constexpr, PLAIN: tl.constexpr):
    """Entries ``index`` of the scales' own code."""
    if LOOK_UP == "table":
        return tl.inline_asm_elementwise(NESTED_ENTRY, "=f,r", [index], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return load_from(nested_code, index, False, PLAIN)


@triton.jit
def arrange_kernel(x, y, pairs, stride_x, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program copies BLOCK pairs of columns of a row."""
    if EARLY:  # in this order: what is launched early may read what the kernel ahead of this one writes
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = place // 32 * 32 + place % 8 * 4 + place // 8 % 4
    row = tl.program_id(0).to(tl.int64)
    tl.store(y + row * pairs + place, tl.load(x + row * stride_x + source, source < pairs), place < pairs)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    ptr = f"*{float_dtype}"
    vector = scale_signature() | {"x": ptr, "y": ptr} | dict.fromkeys(("n", "k_blocks", "stride_x", "stride_y"), "i32")
    constants = {"BLOCKSIZE": 64, "NESTED": True, "NESTED_BLOCKSIZE": 256, "LOOK_UP": "mixed"}
    examples: list[tuple] = []
    for batch in (1, 4):
        rows, blocks, warps = matvec_shape(batch, 14336, 4096)
        shape = {**constants, "BATCH": batch, "ROWS": rows, "BLOCKS": blocks}
        examples.append((nf4_matvec_kernel, vector, shape, {"num_warps": warps}))
    signature = {"x": "*i32", "y": "*i32", "pairs": "i32", "stride_x": "i32"}
    examples.append((arrange_kernel, signature, {"EARLY": False, "BLOCK": 1024}, {"num_warps": 4}))
    for rows, rank, nested, count in ((32, 32, True, 3), (128, 0, False, 1)):
        table = float_dtype == "bf16"
        batch, tile, blocks, _, warps, stages = tile_shape(rows, [14336], 4096, 132, 2**18 if table else 2**16)
        stages += table  # as many as on cards before 9.0
        shape = {**constants, "COUNT": count, "NESTED": nested, "RANK": rank, "PARTS": 1, "PLAIN": False}
        shape |= {"MASKED": nested, "ROUND": False}
        shape |= {"EARLY": False, "LATE": False, "BATCH": batch, "ROWS": tile, "BLOCKS": blocks, "STAGES": stages}
        shape |= {"WARPS": warps, "LOOK_UP": "table" if table else "mixed"}
        types = group_signature(float_dtype, "*i32", nested, count) | {"x": ptr, "y": "*fp32", "mask": ptr}
        types |= dict.fromkeys(
            ("m", "outputs", "k_blocks", "part_blocks", "ranks", "first_rank", "adapters"), "i32"
        ) | {"stride_x": "i32:16"}
        examples.append((nf4_matmul_kernel, types, shape, {"num_warps": warps}))
    return examples
