"""Products of a 4-bit matrix with up to 32 rows, written for the registers of the matrix units.

    y[m, n] = sum over k of x[m, k] * code[nibble[n, k]] * scale[n, k // blocksize]

A matrix-vector product reads W once, so it should take as long as reading it; what stands in the way is the number of
instructions a value. Here a byte, which is two values, costs three: pick it out of its word, turn it into an address,
load both values at once as a pair of 16-bit numbers from a table of 256 pairs in shared memory. Every lane has a copy
of the table in its own bank, 32 KiB in all, so no two lanes ever wait for each other. The matrix units multiply the
pairs with x as they lie, since the sum over k may run in any order: lane 4 g + t of a warp takes the bytes 8 t to
8 t + 7 of a block of 64 values in the rows g and g + 8, and the same values of row g of x. Scales multiply the sums of
64 products in float32, so what is rounded is the table alone (to x's dtype), the output aside.

A program goes through tiles of 16 rows of W. Its warps share K and add their sums through shared memory. The next
words are on their way while the current ones are multiplied.

Triton has no types for any of this, so scalars here are registers: they differ from thread to thread, and the
instructions on them are written out. The layout of W is described in :mod:`unsloth.kernels.nf4`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.kernels.dispatch import capability, interpreting, launch_on, processor_count
from unsloth.kernels.nf4 import NF4Weight, scale_arguments, scale_signature

MOST_ROWS = 32


def takes_fragments(x: torch.Tensor, weight: NF4Weight) -> bool:
    """Whether the kernel can take rows ``x`` [M, K] of a supported number: 16-bit, on a card with bfloat16 products."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1
    half = x.dtype in (torch.float16, torch.bfloat16) and not interpreting() and x.is_cuda
    whole = weight.shape[1] % 64 == 0 and weight.blocksize >= 64
    return half and aligned and whole and x.shape[0] <= MOST_ROWS and capability(x.device) >= (8, 0)


def multiply_fragments(x: torch.Tensor, weight: NF4Weight, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """``x @ W.T`` for x [M, K] that :func:`takes_fragments` accepts; ``shape`` overrides :func:`launch_shape`."""
    rows, (n, k) = x.shape[0], weight.shape
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    warps, programs = shape or launch_shape(rows)
    tiles = triton.cdiv(n, 16)
    columns = 1 << max(0, (triton.cdiv(rows, 8) - 1).bit_length())
    with launch_on(x):
        nf4_fragments_kernel[(min(tiles, programs * processor_count(x.device)),)](
            x, weight.packed, *scale_arguments(weight), y, rows, n, k // 64, tiles, x.stride(0), y.stride(0),
            BLOCKSIZE=weight.blocksize, NESTED=weight.nested, NESTED_BLOCKSIZE=weight.nested_blocksize,
            EVEN=(k // 64) % (4 * warps) == 0, HALF=x.dtype == torch.float16, COLUMNS=columns, WARPS=warps,
            num_warps=warps,
        )  # fmt: skip
    return y


def launch_shape(rows: int) -> tuple[int, int]:
    """Warps of a program (at most 8), and programs a multiprocessor."""
    return 8, 2 if rows <= 16 else 1


def _assembly(*lines: str) -> tl.constexpr:
    return tl.constexpr("\n".join(["{", *lines, "}"]))


def _load_words() -> tl.constexpr:
    """Outputs 0 to 3: eight bytes of one row, of four blocks; 4 to 7: of another row. Inputs: addresses, offsets."""
    lines = [".reg .b64 a, o;"]
    for i in range(8):
        lines += [f"cvt.u64.u32 o, ${10 + i % 4};", f"add.u64 a, ${8 + i // 4}, o;"]
        lines.append(f"ld.global.L1::no_allocate.b64 ${i}, [a];")
    return _assembly(*lines)


def _load_words_even() -> tl.constexpr:
    """As _load_words where the four blocks lie one after the other: no offsets."""
    return _assembly(*(f"ld.global.L1::no_allocate.b64 ${i}, [${8 + i // 4} + {i % 4 * 32}];" for i in range(8)))


def _multiply_block(columns: int, kind: str) -> tl.constexpr:
    """Sums over a block of 64 values: per tile of 8 rows of x the outputs c0 to c3 of its fragment.

    Inputs after the outputs: words of row g, words of row g + 8, this lane's place in the table, then the address of
    x's values and whether the row exists, of every tile.
    """
    first = 4 * columns
    lines = [".reg .f32 zero;", ".reg .b32 w<4>, a<16>, x<8>;", "mov.f32 zero, 0f00000000;"]
    lines += [f"mov.b64 {{w0, w1}}, ${first};", f"mov.b64 {{w2, w3}}, ${first + 1};"]
    for step in range(4):
        for register in range(4):
            byte, row = 2 * step + register // 2, register % 2
            name = f"a{4 * step + register}"
            lines.append(f"prmt.b32 {name}, w{2 * row + byte // 4}, 0, {0x4440 + byte % 4};")
            lines.append(f"mad.lo.u32 {name}, {name}, 128, ${first + 2};")
            lines.append(f"ld.shared.b32 {name}, [{name}];")
    for tile in range(columns):
        address = first + 3 + tile
        lines += [f"ld.global.nc.v4.b32 {{x0, x1, x2, x3}}, [${address}];"]
        lines += [f"ld.global.nc.v4.b32 {{x4, x5, x6, x7}}, [${address} + 16];"]
        sums = ", ".join(f"${4 * tile + i}" for i in range(4))
        for step in range(4):
            a = ", ".join(f"a{4 * step + i}" for i in range(4))
            before = "zero, zero, zero, zero" if step == 0 else sums
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{{a}}}, "
                f"{{x{2 * step}, x{2 * step + 1}}}, {{{before}}};"
            )
    return _assembly(*lines)


THREAD = _assembly("mov.u32 $0, %tid.x;")
TABLE = _assembly(".shared .align 128 .b8 table[32768];", "mov.u32 $0, table;")
SUMS = _assembly(".shared .align 128 .b8 sums[8192];", "mov.u32 $0, sums;")
FILL = _assembly("st.shared.v4.b32 [$1], {$2, $2, $2, $2};", "mov.b32 $0, 0;")
PAIR_BF16 = _assembly("cvt.rn.bf16x2.f32 $0, $2, $1;")
PAIR_FP16 = _assembly("cvt.rn.f16x2.f32 $0, $2, $1;")
STAY = _assembly("bar.warp.sync 0xffffffff;", "mov.b32 $0, 0;")  # loads before it are not moved behind it
FROM_QUAD = _assembly("shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;")
STORE_SUMS = _assembly("st.shared.v2.f32 [$1], {$2, $3};", "st.shared.v2.f32 [$1 + 256], {$4, $5};", "mov.b32 $0, 0;")
LOAD_SUM = _assembly("ld.shared.f32 $0, [$1];")
STORE_BF16 = _assembly(
    ".reg .pred p;", ".reg .b16 v;", "setp.ne.u32 p, $3, 0;", "cvt.rn.bf16.f32 v, $2;", "@p st.global.b16 [$1], v;",
    "mov.b32 $0, 0;",
)  # fmt: skip
STORE_FP16 = _assembly(
    ".reg .pred p;", ".reg .b16 v;", "setp.ne.u32 p, $3, 0;", "cvt.rn.f16.f32 v, $2;", "@p st.global.b16 [$1], v;",
    "mov.b32 $0, 0;",
)  # fmt: skip
LOAD_WORDS, LOAD_WORDS_EVEN = _load_words(), _load_words_even()
MULTIPLY_BF16 = tl.constexpr(tuple(_multiply_block(c, "bf16").value if c in (1, 2, 4) else "" for c in range(5)))
MULTIPLY_FP16 = tl.constexpr(tuple(_multiply_block(c, "f16").value if c in (1, 2, 4) else "" for c in range(5)))
EIGHT_WORDS = tl.constexpr((tl.int64,) * 8)
SUM_TYPES = tl.constexpr(tuple((tl.float32,) * (4 * c) for c in range(5)))
MULTIPLY_CONSTRAINTS = tl.constexpr(tuple(",".join(["=f"] * (4 * c) + ["l", "l", "r"] + ["l"] * c) for c in range(5)))


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
def load_block_words(words, row0, row1, first, k_blocks, t, EVEN: tl.constexpr):
    """This lane's eight bytes of four blocks from ``first`` on, in two rows."""
    a0 = words.to(tl.int64) + (row0.to(tl.int64) * k_blocks) * 32 + t * 8
    a1 = words.to(tl.int64) + (row1.to(tl.int64) * k_blocks) * 32 + t * 8
    if EVEN:
        return tl.inline_asm_elementwise(
            LOAD_WORDS_EVEN, "=l,=l,=l,=l,=l,=l,=l,=l,l,l", [a0 + first * 32, a1 + first * 32], dtype=EIGHT_WORDS,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        last = k_blocks - 1
        offsets = [
            tl.minimum(first, last) * 32, tl.minimum(first + 1, last) * 32, tl.minimum(first + 2, last) * 32,
            tl.minimum(first + 3, last) * 32,
        ]  # fmt: skip
        return tl.inline_asm_elementwise(
            LOAD_WORDS,
            "=l,=l,=l,=l,=l,=l,=l,=l,l,l,r,r,r,r",
            [a0, a1] + offsets,
            dtype=EIGHT_WORDS,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_codes(
    absmax, nested_absmax, row, first, k_blocks, t, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """What the scale of block ``first + t`` of a row is made of: its code, and the nested scale (or scale and 0)."""
    block = (row * k_blocks + tl.minimum(first + t, k_blocks - 1)) // (BLOCKSIZE // 64)
    if NESTED:
        return tl.load(absmax + block).to(tl.int32), tl.load(nested_absmax + block // NESTED_BLOCKSIZE)
    else:
        return 0, tl.load(absmax + block)


@triton.jit
def finish_scale(index, nested, shift, nested_code, NESTED: tl.constexpr):
    """The scale from what load_codes gave."""
    if NESTED:
        return tl.load(nested_code + index) * nested + shift
    else:
        return nested


@triton.jit
def nf4_fragments_kernel(  # noqa: C901  its switches are compile-time constants
    x, words, code, absmax, nested_code, nested_absmax, offset, y, m, n, k_blocks, tiles, stride_x, stride_y,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, EVEN: tl.constexpr,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A program computes every tile of 16 outputs that is its own, for up to 8 * COLUMNS rows of x."""
    thread = assembly_int(THREAD, "=r,r", [0])
    lane, warp = thread & 31, thread >> 5
    g, t = lane >> 2, lane & 3
    steps = tl.cdiv(tl.cdiv(k_blocks, 4), WARPS)
    tile = tl.program_id(0)
    row0, row1 = tl.minimum(tile * 16 + g, n - 1), tl.minimum(tile * 16 + 8 + g, n - 1)
    first = warp * 4
    ahead = load_block_words(words, row0, row1, first, k_blocks, t, EVEN)
    code0, nested0 = load_codes(absmax, nested_absmax, row0, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE)
    code1, nested1 = load_codes(absmax, nested_absmax, row1, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE)
    shift = 0.0
    if NESTED:
        shift = tl.load(offset)
    table = fill_table(code, HALF, 32 * WARPS) + lane * 4
    sums = assembly_int(SUMS, "=r,r", [0])
    tl.debug_barrier()
    inputs = tl.tuple(())
    for column in tl.static_range(COLUMNS):  # rows beyond the last one give sums that nobody stores
        row = tl.minimum(column * 8 + g, m - 1)
        inputs = inputs + (x.to(tl.int64) + (row.to(tl.int64) * stride_x + t * 16) * 2,)
    parity = 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        total = (0.0,) * (4 * COLUMNS)
        for step in range(steps):
            current, place = ahead, first
            scale0 = finish_scale(code0, nested0, shift, nested_code, NESTED)
            scale1 = finish_scale(code1, nested1, shift, nested_code, NESTED)
            if not EVEN:
                scale0 = tl.where(place + t < k_blocks, scale0, 0.0)
                scale1 = tl.where(place + t < k_blocks, scale1, 0.0)
            # the next words: of this tile, or the first ones of the next tile, or any where there is none
            ends = step + 1 == steps
            following = tl.where(ends, tile + tl.num_programs(0), tile)
            row0 = tl.minimum(following * 16 + g, n - 1)
            row1 = tl.minimum(following * 16 + 8 + g, n - 1)
            first = tl.where(ends, warp * 4, first + 4 * WARPS)
            ahead = load_block_words(words, row0, row1, first, k_blocks, t, EVEN)
            code0, nested0 = load_codes(
                absmax, nested_absmax, row0, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE
            )
            code1, nested1 = load_codes(
                absmax, nested_absmax, row1, first, k_blocks, t, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE
            )
            assembly_int(STAY, "=r,r", [0])
            for j in tl.static_range(4):
                block = place + j if EVEN else tl.minimum(place + j, k_blocks - 1)
                operands = [current[j], current[4 + j], table]
                for column in tl.static_range(COLUMNS):
                    operands = operands + [inputs[column] + block * 128]
                part = tl.inline_asm_elementwise(
                    MULTIPLY_FP16[COLUMNS] if HALF else MULTIPLY_BF16[COLUMNS], MULTIPLY_CONSTRAINTS[COLUMNS],
                    operands, dtype=SUM_TYPES[COLUMNS], is_pure=False, pack=1,
                )  # fmt: skip
                block0 = tl.inline_asm_elementwise(
                    FROM_QUAD, "=f,f,r", [scale0, j], dtype=tl.float32, is_pure=False, pack=1
                )
                block1 = tl.inline_asm_elementwise(
                    FROM_QUAD, "=f,f,r", [scale1, j], dtype=tl.float32, is_pure=False, pack=1
                )
                grown = tl.tuple(())
                for i in tl.static_range(4 * COLUMNS):
                    grown = grown + (total[i] + (block0 if i % 4 < 2 else block1) * part[i],)
                total = grown
        for column in tl.static_range(COLUMNS):
            base = sums + parity * (WARPS * 512)
            assembly_int(
                STORE_SUMS, "=r,r,f,f,f,f",
                [base + warp * 512 + g * 32 + t * 8, total[4 * column], total[4 * column + 1], total[4 * column + 2],
                 total[4 * column + 3]],
            )  # fmt: skip
            tl.debug_barrier()
            row, batch = thread & 15, column * 8 + ((thread >> 4) & 7)
            value = 0.0
            for other in tl.static_range(WARPS):
                value += tl.inline_asm_elementwise(
                    LOAD_SUM, "=f,r", [base + other * 512 + row * 32 + (batch & 7) * 4], dtype=tl.float32,
                    is_pure=False, pack=1,
                )  # fmt: skip
            out = tile * 16 + row
            wanted = ((thread < 128) & (out < n) & (batch < m)).to(tl.int32)
            to = y.to(tl.int64) + (batch.to(tl.int64) * stride_y + out) * 2
            assembly_int(STORE_FP16 if HALF else STORE_BF16, "=r,l,f,r", [to, value, wanted])
            parity = 1 - parity


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU.

    The instructions need a card of compute capability 8.0, for which bfloat16 stands here.
    """
    if float_dtype != "bf16":
        return []
    signature = scale_signature() | {"x": "*bf16", "words": "*u8", "y": "*bf16"}
    signature |= dict.fromkeys(("m", "n", "k_blocks", "tiles", "stride_x", "stride_y"), "i32")
    examples = []
    for columns, even in ((1, True), (2, False), (4, True)):
        constants = {"BLOCKSIZE": 64, "NESTED": even, "NESTED_BLOCKSIZE": 256, "EVEN": even, "HALF": not even}
        constants |= {"COLUMNS": columns, "WARPS": 8}
        types = signature if even else {**signature, "x": "*fp16", "y": "*fp16", "absmax": "*fp32"}
        examples.append((nf4_fragments_kernel, types, constants, {"num_warps": 8}))
    return examples
