"""Products of a 4-bit matrix with up to 16 rows, written for the registers of the matrix units.

    y[m, n] = sum over k of x[m, k] * code[nibble[n, k]] * scale[n, k // blocksize]

A matrix-vector product reads W once, so it should take as long as reading it; what stands in the way is the number of
instructions a value. Here a byte, which is two values, costs three: pick it out of its word, turn it into an address,
load both values at once as a pair of 16-bit numbers from a table of 256 pairs in shared memory. Every lane has a copy
of the table in its own bank, 32 KiB in all, so no two lanes ever wait for each other. The matrix units multiply the
pairs with x as they lie, since the sum over k may run in any order: of a pair of blocks of 64 values, lane 4 g + t of a
warp takes the bytes 16 t to 16 t + 15 in the rows g and g + 8, and the same 32 values of row g of x. The blocks have
scales of their own, so the second block's sum is taken once more by itself, with the other lanes' x set to zero.
Scales multiply these sums in float32: what is rounded is the table alone (to x's dtype), the output aside.

A program goes through tiles of 16 rows of W. Its warps share K and add their sums through shared memory. The next
words are on their way while the current ones are multiplied.

Triton has no types for any of this, so scalars here are registers: they differ from thread to thread, and the
instructions on them are written out. The layout of W is described in :mod:`unsloth.kernels.nf4`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from unsloth.kernels.dispatch import (
    capability,
    early_launch,
    interpreting,
    launch_on,
    overlaps_launches,
    processor_count,
)
from unsloth.kernels.joined_products import (
    MOST_MATRICES,
    LowRank,
    find_matrix,
    pick,
    pick_pointer,
    side_arguments,
    split_rows,
)
from unsloth.kernels.nf4 import NF4Weight, assembly, scale_arguments

MOST_ROWS = 16


def takes_fragments(x: torch.Tensor, weight: NF4Weight) -> bool:
    """Whether the kernel can take ``x`` [M, K]: at most 16 aligned rows, 16-bit, on a card with bfloat16 products."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1
    half = x.dtype in (torch.float16, torch.bfloat16) and not interpreting() and x.is_cuda
    aligned = aligned and weight.packed.data_ptr() % 16 == 0
    whole = weight.shape[1] % 64 == 0 and weight.blocksize >= 64
    return half and aligned and whole and x.shape[0] <= MOST_ROWS and capability(x.device) >= (8, 0)


def launch_together(weights: Sequence[NF4Weight]) -> bool:
    """Whether one launch can multiply by all of these: up to three matrices alike in all but their rows."""
    kinds = {(w.shape[1], w.blocksize, w.nested, w.nested_blocksize, w.quant_type) for w in weights}
    return len(weights) <= MOST_MATRICES and len(kinds) == 1 and (len(weights) == 1 or weights[0].quant_type == "nf4")


def multiply_fragments(
    x: torch.Tensor,
    weights: Sequence[NF4Weight],
    *,
    side: LowRank | None = None,
    shape: tuple[int, int] | None = None,
) -> list[torch.Tensor]:
    """``x @ W.T`` for each of ``weights``, which :func:`launch_together` and :func:`takes_fragments` accept.

    Args:
        x: [M, K].
        weights: The quantized matrices [N_i, K].
        side: Added before the results are rounded, or None.
        shape: Overrides :func:`launch_shape`.

    Returns:
        [M, N_i] of each, contiguous.
    """
    rows, k = x.shape
    sizes = [weight.shape[0] for weight in weights]
    y = torch.empty(rows * sum(sizes), dtype=x.dtype, device=x.device)
    tiles = sum(triton.cdiv(n, 16) for n in sizes)
    warps, programs = shape or launch_shape(rows, tiles, processor_count(x.device))
    overlaps = overlaps_launches(x.device)
    with launch_on(x):
        nf4_fragments_kernel[(min(tiles, programs * processor_count(x.device)),)](
            x, tuple(weight.packed for weight in weights), *group_arguments(weights), y, rows, tuple(sizes), k // 64,
            tiles, x.stride(0), *side_arguments(side), COUNT=len(weights), RANK=0 if side is None else side.rank,
            PARTS=0 if side is None else side.projections.shape[0], BLOCKSIZE=weights[0].blocksize,
            NESTED=weights[0].nested, NESTED_BLOCKSIZE=weights[0].nested_blocksize, HALF=x.dtype == torch.float16,
            EARLY=overlaps, FEW=int(rows <= 4), COLUMNS=triton.cdiv(rows, 8), WARPS=warps, num_warps=warps,
            **early_launch(overlaps),
        )  # fmt: skip
    return split_rows(y, rows, sizes)


def group_arguments(weights: Sequence[NF4Weight]) -> tuple:
    """The kernels' arguments that say how to decode: a code, and absmax, nested_code, ... of each matrix."""
    _, *rest = zip(*(scale_arguments(weight) for weight in weights), strict=True)
    return (weights[0].code, *rest)


def launch_shape(rows: int, tiles: int, processors: int) -> tuple[int, int]:
    """Warps of a program (1, 2, 4 or 8), and programs a multiprocessor."""
    return (8, 2) if rows <= 8 and tiles < 2 * processors else (4, 4)  # more warps where tiles are few


def _load_pairs() -> tl.constexpr:
    """Outputs 0 to 3: 16 bytes of one row in each of two pairs of blocks; 4 to 7: of another row.

    Inputs: addresses of the two rows, offsets of the two pairs.
    """
    lines = [".reg .b64 a, o;"]
    for i in range(4):
        lines += [f"cvt.u64.u32 o, ${10 + i % 2};", f"add.u64 a, ${8 + i // 2}, o;"]
        lines.append(f"ld.global.v2.b64 {{${2 * i}, ${2 * i + 1}}}, [a];")
    return assembly(*lines)


def _multiply_pair(columns: int, kind: str) -> tl.constexpr:
    """Sums over a pair of blocks, 128 values, and over its second block alone, for 8 rows of x a column.

    Outputs, for each column: c0 to c3 of the first sum's fragment, then of the second's. Inputs: 16 bytes of row g,
    16 of row g + 8, this lane's place in the table, whether the lane's bytes belong to the second block, then for each
    column the address of x's values and whether the row exists (where it does not, nobody reads the sums).

    No column: up to 4 rows of x in one, each there twice, once for each block. The lanes of one block have no x (it
    does not "exist") for the other's, so that c0 and c2 are the first block's sums, c1 and c3 the second's.
    """
    few, columns = columns == 0, max(columns, 1)
    first = 4 if few else 8 * columns
    lines = [".reg .pred later, p;", ".reg .f32 zero;", f".reg .b32 w<8>, a<4>, x<{16 * columns}>, y<2>;"]
    lines += ["mov.f32 zero, 0f00000000;", f"setp.ne.u32 later, ${first + 5}, 0;"]
    lines += [f"mov.b64 {{w{2 * i}, w{2 * i + 1}}}, ${first + i};" for i in range(4)]
    for column in range(columns):
        address, exists = first + 6 + 2 * column, first + 7 + 2 * column
        if columns == 1:  # lanes without a row load nothing, which matters where there is but one row
            lines += [f"setp.ne.u32 p, ${exists}, 0;", *(f"mov.b32 x{i}, 0;" for i in range(16))]
        for i in range(4):
            four = ", ".join(f"x{16 * column + 4 * i + j}" for j in range(4))
            guard = "@p " if columns == 1 else ""
            lines.append(f"{guard}ld.global.nc.v4.b32 {{{four}}}, [${address} + {16 * i}];")
    for step in range(8):
        for register in range(4):
            byte, row = 2 * step + register // 2, register % 2
            lines.append(f"prmt.b32 a{register}, w{4 * row + byte // 4}, 0, {0x4440 + byte % 4};")
            lines.append(f"mad.lo.u32 a{register}, a{register}, 128, ${first + 4};")
            lines.append(f"ld.shared.b32 a{register}, [a{register}];")
        for column in range(columns):
            pair = [f"x{16 * column + 2 * step + i}" for i in range(2)]
            products = [pair] if few else [pair, ["y0", "y1"]]
            if not few:
                lines += [f"selp.b32 y{i}, {pair[i]}, 0, later;" for i in range(2)]
            for part, (b0, b1) in enumerate(products):
                sums = ", ".join(f"${8 * column + 4 * part + i}" for i in range(4))
                before = "zero, zero, zero, zero" if step == 0 else sums
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{a0, a1, a2, a3}}, "
                    f"{{{b0}, {b1}}}, {{{before}}};"
                )
    return assembly(*lines)


def _add_side(kind: str) -> tl.constexpr:
    """Fragment of 16 columns of B, rows at $4 (g) and $5 (g + 8), times the pairs $6 and $7 of t."""
    loads = [f"ld.global.nc.b32 a{i}, [${4 + i % 2} + {i // 2 * 16}];" for i in range(4)]
    product = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$6, $7}}"
    )
    return assembly(
        ".reg .b32 a<4>;",
        ".reg .f32 zero;",
        "mov.f32 zero, 0f00000000;",
        *loads,
        f"{product}, {{zero, zero, zero, zero}};",
    )


THREAD = assembly("mov.u32 $0, %tid.x;")
# Without a scope of their own, so that later instructions know them by name.
TABLE = tl.constexpr(".shared .align 128 .b8 nf4_pairs[32768];\nmov.u32 $0, nf4_pairs;")
NESTED_TABLE = tl.constexpr(".shared .align 16 .b8 nf4_scales[3072];\nmov.u32 $0, nf4_scales;")
SUMS = tl.constexpr(
    tuple(assembly(f".shared .align 128 .b8 sums[{warps * 1024}];", "mov.u32 $0, sums;").value for warps in range(9))
)
STORE_ONE = assembly("st.shared.f32 [$1], $2;", "mov.b32 $0, 0;")
FILL = assembly("st.shared.v4.b32 [$1], {$2, $2, $2, $2};", "mov.b32 $0, 0;")
PAIR_BF16 = assembly("cvt.rn.bf16x2.f32 $0, $2, $1;")
PAIR_FP16 = assembly(  # for cards older than 8.0 too
    ".reg .b16 a, b;", "cvt.rn.f16.f32 a, $1;", "cvt.rn.f16.f32 b, $2;", "mov.b32 $0, {a, b};"
)
FETCH = assembly("prefetch.global.L2 [$1];", "prefetch.global.L2 [$2];", "mov.b32 $0, 0;")
STAY = assembly("bar.warp.sync 0xffffffff;", "mov.b32 $0, 0;")  # loads before it are not moved behind it
FROM_QUAD = assembly("shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;")
STORE_SUMS = assembly("st.shared.v2.f32 [$1], {$2, $3};", "st.shared.v2.f32 [$1 + 256], {$4, $5};", "mov.b32 $0, 0;")
LOAD_SUM = assembly("ld.shared.f32 $0, [$1];")
STORE_BF16 = assembly(
    ".reg .pred p;", ".reg .b16 v;", "setp.ne.u32 p, $3, 0;", "cvt.rn.bf16.f32 v, $2;", "@p st.global.b16 [$1], v;",
    "mov.b32 $0, 0;",
)  # fmt: skip
STORE_FP16 = assembly(
    ".reg .pred p;", ".reg .b16 v;", "setp.ne.u32 p, $3, 0;", "cvt.rn.f16.f32 v, $2;", "@p st.global.b16 [$1], v;",
    "mov.b32 $0, 0;",
)  # fmt: skip
LOAD_PAIRS = _load_pairs()
MULTIPLY_BF16 = tl.constexpr(tuple(_multiply_pair(c, "bf16").value for c in range(3)))
MULTIPLY_FP16 = tl.constexpr(tuple(_multiply_pair(c, "f16").value for c in range(3)))
ADD_SIDE_BF16, ADD_SIDE_FP16 = _add_side("bf16"), _add_side("f16")
SUM_OF_FOUR = tl.constexpr((tl.float32,) * 4)
EIGHT_WORDS = tl.constexpr((tl.int64,) * 8)
SUM_TYPES = tl.constexpr(tuple((tl.float32,) * (8 * c or 4) for c in range(3)))
MULTIPLY_CONSTRAINTS = tl.constexpr(
    tuple(",".join(["=&f"] * (8 * c or 4) + ["l"] * 4 + ["r"] * 2 + ["l", "r"] * max(c, 1)) for c in range(3))
)


@triton.jit
def assembly_int(text: tl.constexpr, constraints: tl.constexpr, operands):
    """One int32 output of ``text``, which must run where it stands."""
    return tl.inline_asm_elementwise(text, constraints, operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fill_table(code, HALF: tl.constexpr, THREADS: tl.constexpr):
    """Lay out the table, 32 copies of each pair next to each other; returns its address in shared memory."""
    table = assembly_int(TABLE, "=r,r", [0])
    thread = assembly_int(THREAD, "=r,r", [0])
    for start in tl.static_range(0, 256, THREADS):
        byte = (start + thread) & 255
        first = tl.load(code + (byte >> 4))
        second = tl.load(code + (byte & 15))
        pair = assembly_int(PAIR_FP16 if HALF else PAIR_BF16, "=r,f,f", [first, second])
        for i in tl.static_range(8):  # each lane begins elsewhere, so that a warp's stores fall into different banks
            assembly_int(FILL, "=r,r,r", [table + byte * 128 + ((thread + i) & 7) * 16, pair])
    return table


@triton.jit
def fill_nested(nested_codes, THREADS: tl.constexpr, COUNT: tl.constexpr):
    """Copy the scales' own codes, one after the other; returns their address in shared memory."""
    table = assembly_int(NESTED_TABLE, "=r,r", [0])
    thread = assembly_int(THREAD, "=r,r", [0])
    for i in tl.static_range(COUNT):
        for start in tl.static_range(0, 256, THREADS):
            entry = (start + thread) & 255
            value = tl.load(nested_codes[i] + entry)
            assembly_int(STORE_ONE, "=r,r,f", [table + i * 1024 + entry * 4, value])
    return table


@triton.jit
def sum_parts(projections, at, stride, HALF: tl.constexpr, PARTS: tl.constexpr):
    """Entries ``at`` (even) and ``at + 1`` of the projections, summed over the parts, as a pair of 16-bit numbers."""
    pairs = projections.to(tl.int64).to(tl.pointer_type(tl.int64))
    first, second = 0.0, 0.0
    for part in tl.static_range(PARTS):
        pair = tl.load(pairs + (part * stride + at) // 2)
        first += pair.to(tl.int32).to(tl.float32, bitcast=True)
        second += (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return assembly_int(PAIR_FP16 if HALF else PAIR_BF16, "=r,f,f", [first, second])


@triton.jit
def load_pairs(words, row0, row1, first, k_blocks, t):
    """This lane's 16 bytes of two pairs of blocks from ``first`` on, in two rows; clamped to the row's end."""
    a0 = words.to(tl.int64) + row0.to(tl.int64) * k_blocks * 32
    a1 = words.to(tl.int64) + row1.to(tl.int64) * k_blocks * 32
    last = k_blocks * 32 - 16
    offset = first * 32 + t * 16
    return tl.inline_asm_elementwise(
        LOAD_PAIRS, "=l,=l,=l,=l,=l,=l,=l,=l,l,l,r,r",
        [a0, a1, tl.minimum(offset, last), tl.minimum(offset + 64, last)], dtype=EIGHT_WORDS, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_codes(
    absmax, nested_absmax, row, first, k_blocks, t, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """What the scale of block ``first + t`` of a row is made of: code and nested scale (or 0 and scale)."""
    block = (row * k_blocks + tl.minimum(first + t, k_blocks - 1)) // (BLOCKSIZE // 64)
    if NESTED:
        return tl.load(absmax + block).to(tl.int32), tl.load(nested_absmax + block // NESTED_BLOCKSIZE)
    else:
        return 0, tl.load(absmax + block)


@triton.jit
def load_step(
    words, absmax, nested_absmax, tile, first, sizes, k_blocks, g, t, COUNT: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """Words (8) and what scales are made of (4) of four blocks in two rows of a tile (or of any tile)."""
    which, before, _ = find_matrix(tile, sizes, 16, COUNT)
    row, n = (tile - before) * 16 + g, pick(which, sizes, COUNT)
    row0, row1 = tl.minimum(row, n - 1), tl.minimum(row + 8, n - 1)
    found = load_pairs(pick_pointer(which, words, COUNT), row0, row1, first, k_blocks, t)
    absmax, nested = pick_pointer(which, absmax, COUNT), nested_absmax[0]
    if NESTED:
        nested = pick_pointer(which, nested_absmax, COUNT)
    code0, nested0 = load_codes(absmax, nested, row0, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE)
    code1, nested1 = load_codes(absmax, nested, row1, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE)
    return found + (code0, nested0, code1, nested1)


@triton.jit
def next_step(tile, first, warp, steps, WARPS: tl.constexpr):
    """The step after one: of the same tile, or the first one of the program's next tile."""
    ends = first + 4 * WARPS >= steps * 4 * WARPS
    return tl.where(ends, tile + tl.num_programs(0), tile), tl.where(ends, warp * 4, first + 4 * WARPS)


@triton.jit
def finish_scale(index, nested, shift, nested_table, exists, NESTED: tl.constexpr):
    """The scale from what load_codes gave, 0 for a block that does not exist."""
    scale = nested
    if NESTED:
        entry = tl.inline_asm_elementwise(
            LOAD_SUM, "=f,r", [nested_table + index * 4], dtype=tl.float32, is_pure=False, pack=1
        )
        scale = entry * nested + shift
    return tl.where(exists, scale, 0.0)


@triton.jit
def of_quad(value, lane: tl.constexpr):
    """The float of another lane of this lane's four."""
    return tl.inline_asm_elementwise(FROM_QUAD, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def nf4_fragments_kernel(  # noqa: C901  its switches are compile-time constants
    x, words, code, absmax, nested_codes, nested_absmax, offsets, y, m, sizes, k_blocks, tiles, stride_x, projections,
    ranks, first_rank, side_b, side_scales, COUNT: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, HALF: tl.constexpr,
    EARLY: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A program computes every tile of 16 outputs that is its own, for up to 8 * COLUMNS rows of x.

    Tiles are counted through all matrices. EARLY: the kernel ahead may still be at work; it makes the projections, or x
    where there are none. FEW: at most 4 rows, for which half of the products do.
    """
    thread = assembly_int(THREAD, "=r,r", [0])
    lane, warp = thread & 31, thread >> 5
    g, t = lane >> 2, lane & 3
    steps = tl.cdiv(tl.cdiv(k_blocks, 4), WARPS)
    form: tl.constexpr = 0 if FEW else COLUMNS
    tile, first = tl.program_id(0), warp * 4
    waiting = load_step(
        words, absmax, nested_absmax, tile, first, sizes, k_blocks, g, t, COUNT, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE
    )
    tile, first = next_step(tile, first, warp, steps, WARPS)
    shifts, nested_table = (0.0,) * COUNT, 0
    if NESTED:
        shifts = tl.tuple(())
        for i in tl.static_range(COUNT):
            shifts = shifts + (tl.load(offsets[i]),)
        nested_table = fill_nested(nested_codes, 32 * WARPS, COUNT)
    table = fill_table(code, HALF, 32 * WARPS) + lane * 4
    sums = tl.inline_asm_elementwise(SUMS[WARPS], "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    if EARLY and not RANK:
        gdc_wait()
    inputs = tl.tuple(())
    for column in tl.static_range(COLUMNS):
        row = tl.minimum((column * 8 + g) >> FEW, m - 1)
        inputs = inputs + (x.to(tl.int64) + row.to(tl.int64) * stride_x * 2,)
    parity, ahead = 0, tile
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        which, before, rows_before = find_matrix(tile, sizes, 16, COUNT)
        n, shift, tile_row = pick(which, sizes, COUNT), pick(which, shifts, COUNT), (tile - before) * 16
        entries = nested_table + which * 1024
        total = (0.0,) * (4 * COLUMNS)
        b_at, b_row0, b_row1 = x.to(tl.int64), tl.minimum(tile_row + g, n - 1), tl.minimum(tile_row + 8 + g, n - 1)
        if RANK:  # needed at the end of the tile
            b_at = pick_pointer(which, side_b, COUNT).to(tl.int64) + t * 4
            assembly_int(FETCH, "=r,l,l", [b_at + b_row0 * (RANK * 2), b_at + b_row1 * (RANK * 2)])
        for step in range(steps):
            current, place = waiting, (step * WARPS + warp) * 4
            scale0 = finish_scale(current[8], current[9], shift, entries, place + t < k_blocks, NESTED)
            scale1 = finish_scale(current[10], current[11], shift, entries, place + t < k_blocks, NESTED)
            waiting = load_step(
                words, absmax, nested_absmax, ahead, first, sizes, k_blocks, g, t, COUNT, BLOCKSIZE, NESTED,
                NESTED_BLOCKSIZE,
            )  # fmt: skip
            ahead, first = next_step(ahead, first, warp, steps, WARPS)
            assembly_int(STAY, "=r,r", [0])
            for pair in tl.static_range(2):
                at = tl.minimum((place + 2 * pair) * 128 + t * 64, k_blocks * 128 - 64)
                operands = [current[2 * pair], current[2 * pair + 1], current[4 + 2 * pair], current[5 + 2 * pair],
                            table, t >> 1]  # fmt: skip
                for column in tl.static_range(COLUMNS):
                    exists = (column * 8 + g) >> FEW < m
                    if FEW:
                        exists = exists & ((g & 1) == (t >> 1))
                    operands = operands + [inputs[column] + at, exists.to(tl.int32)]
                part = tl.inline_asm_elementwise(
                    MULTIPLY_FP16[form] if HALF else MULTIPLY_BF16[form], MULTIPLY_CONSTRAINTS[form], operands,
                    dtype=SUM_TYPES[form], is_pure=False, pack=1,
                )  # fmt: skip
                first0, second0 = of_quad(scale0, 2 * pair), of_quad(scale0, 2 * pair + 1)
                first1, second1 = of_quad(scale1, 2 * pair), of_quad(scale1, 2 * pair + 1)
                if FEW:  # a row's sums are those of column 2 t
                    total = (
                        total[0] + first0 * part[0] + second0 * part[1], 0.0,
                        total[2] + first1 * part[2] + second1 * part[3], 0.0,
                    )  # fmt: skip
                grown = tl.tuple(())
                for i in tl.static_range(0 if FEW else 4 * COLUMNS):
                    both, second = part[8 * (i // 4) + i % 4], part[8 * (i // 4) + 4 + i % 4]
                    value = total[i] + (first0 if i % 4 < 2 else first1) * (both - second)
                    grown = grown + (value + (second0 if i % 4 < 2 else second1) * second,)
                if not FEW:
                    total = grown
        if RANK:  # every warp computes it, one counts it
            if EARLY:
                gdc_wait()
            side_scale = pick(which, side_scales, COUNT)
            for s in tl.static_range(RANK // 16):
                factor = tl.where(warp == s % WARPS, side_scale, 0.0)
                rows_of_b = [b_at + (b_row0 * RANK + 16 * s) * 2, b_at + (b_row1 * RANK + 16 * s) * 2]
                for column in tl.static_range(COLUMNS):
                    at = tl.minimum((column * 8 + g) >> FEW, m - 1) * ranks + first_rank + which * RANK + 16 * s + 2 * t
                    low = sum_parts(projections, at, m * ranks, HALF, PARTS)
                    high = sum_parts(projections, at + 8, m * ranks, HALF, PARTS)
                    part = tl.inline_asm_elementwise(
                        ADD_SIDE_FP16 if HALF else ADD_SIDE_BF16, "=&f,=&f,=&f,=&f,l,l,r,r",
                        rows_of_b + [low, high], dtype=SUM_OF_FOUR, is_pure=False, pack=1,
                    )  # fmt: skip
                    grown = tl.tuple(())
                    for i in tl.static_range(4 * COLUMNS):
                        grown = grown + (total[i] + factor * part[i % 4] if i // 4 == column else total[i],)
                    total = grown
        for column in tl.static_range(COLUMNS):
            base = sums + parity * (WARPS * 512)
            assembly_int(
                STORE_SUMS, "=r,r,f,f,f,f",
                [base + warp * 512 + g * 32 + t * 8, total[4 * column], total[4 * column + 1], total[4 * column + 2],
                 total[4 * column + 3]],
            )  # fmt: skip
            tl.debug_barrier()
            for start in tl.static_range(0, 128, 32 * WARPS):
                row, batch = thread & 15, column * 8 + (((start + thread) >> 4) & 7)
                value = 0.0
                for other in tl.static_range(WARPS):
                    value += tl.inline_asm_elementwise(
                        LOAD_SUM, "=f,r", [base + other * 512 + row * 32 + ((batch << FEW) & 7) * 4], dtype=tl.float32,
                        is_pure=False, pack=1,
                    )  # fmt: skip
                out = tile_row + row
                wanted = ((start + thread < 128) & (out < n) & (batch < m)).to(tl.int32)
                to = y.to(tl.int64) + (rows_before * m + batch * n + out).to(tl.int64) * 2
                assembly_int(STORE_FP16 if HALF else STORE_BF16, "=r,l,f,r", [to, value, wanted])
            parity = 1 - parity


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU.

    The instructions need a card of compute capability 8.0, for which bfloat16 stands here.
    """
    if float_dtype != "bf16":
        return []
    examples = []
    for columns, nested, count in ((1, True, 3), (2, False, 1)):
        kind = "bf16" if nested else "fp16"
        signature = group_signature(kind, "*u8", nested, count) | {"x": f"*{kind}", "y": f"*{kind}"}
        signature |= dict.fromkeys(("m", "k_blocks", "tiles", "stride_x", "ranks", "first_rank"), "i32")
        constants = {"COUNT": count, "BLOCKSIZE": 64, "NESTED": nested, "NESTED_BLOCKSIZE": 256, "HALF": not nested}
        constants |= {"FEW": int(nested), "COLUMNS": columns, "WARPS": 4, "RANK": 32, "PARTS": 8, "EARLY": False}
        examples.append((nf4_fragments_kernel, signature, constants, {"num_warps": 4}))
    return examples


def group_signature(float_dtype: str, words: str, nested: bool, count: int) -> dict[str, str | tuple[str, ...]]:
    """Types of the arguments that describe ``count`` matrices and what is added to their products."""
    kinds = {"words": words, "absmax": "*u8" if nested else "*fp32", "nested_codes": "*fp32", "nested_absmax": "*fp32"}
    kinds |= {"offsets": "*fp32", "side_b": f"*{float_dtype}", "side_scales": "fp32", "sizes": "i32"}
    return {name: (kind,) * count for name, kind in kinds.items()} | {"code": "*fp32", "projections": "*fp32"}
