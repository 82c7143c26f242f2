"""``y = x @ W.T`` with a 4-bit W that is decoded on the way, for the few rows of a decoding step.

    y[m, n] = sum over k of x[m, k] * code[nibble[n, k]] * scale[n, k // blocksize]

With 16-bit activations, on cards with bfloat16 products, up to 16 rows of x go through the kernel of
:mod:`unsloth.kernels.nf4_fragments`. Elsewhere up to :data:`MATVEC_ROWS` rows go through a matrix-vector kernel: values
are decoded to float32 and multiplied there (with 16-bit activations, to within 2^-13 of a block's largest value), so
nothing else is rounded before the output. Up to :data:`FUSED_ROWS` rows go through a kernel of tiles, which
multiplies values, rounded to x's dtype, with x on the matrix units, a block of 64 columns at a time, and the sums with
the block's scale in float32. It splits K over programs
where N alone gives too few. Beyond that, and wherever a gradient is needed, W is dequantized first.

The layout of W is described in :mod:`unsloth.kernels.nf4`.
"""

from __future__ import annotations

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
    interpreting,
    launch_on,
    overlaps_launches,
    processor_count,
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
from unsloth.kernels.nf4_fragments import LowRank, multiply_fragments, takes_fragments
from unsloth.kernels.rounding import must_round, nearest

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
    if takes_fragments(matrix, weight):
        y = multiply_fragments(matrix, weight)
    elif rows <= MATVEC_ROWS:
        y = _matvec(matrix, weight, words)
    elif takes_tiles(matrix, weight):
        y = multiply_tiles(matrix, weight)
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


def tile_shape(rows: int, n: int, k: int, processors: int, small: bool = False) -> tuple[int, int, int, int, int]:
    """Rows of x in a tile, rows of W in a tile, parts that K is split into, warps, stages of loads.

    Every tile of W reads all of x, so more rows of x want larger tiles; ``small`` says that a program has but 64 KiB of
    shared memory.
    """
    batch = min(32 if small else 128, max(16, triton.next_power_of_2(rows)))
    tile, warps = (64, 4) if batch <= 32 else (128, 8)
    tiles, split = triton.cdiv(n, tile) * triton.cdiv(rows, batch), 1
    while split < 8 and tiles * split < (2 * processors if warps == 4 else processors) and k // 64 >= 8 * split:
        split *= 2
    return batch, tile, split, warps, 2 if small else 3


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


def takes_tiles(x: torch.Tensor, weight: NF4Weight) -> bool:
    """Whether :func:`multiply_tiles` can take ``x`` [M, K]: at most :data:`FUSED_ROWS` rows of a 16-bit dtype."""
    whole = weight.shape[1] % 64 == 0 and weight.blocksize >= 64 and weight.words() is not None
    half = x.dtype == torch.float16 or (
        x.dtype == torch.bfloat16 and (interpreting() or capability(x.device) >= (8, 0))
    )
    return half and whole and 0 < x.shape[0] <= FUSED_ROWS and x.stride(1) == 1 and can_launch(x)


def multiply_tiles(
    x: torch.Tensor,
    weight: NF4Weight,
    *,
    side: LowRank | None = None,
    shape: tuple[int, int, int, int, int] | None = None,
) -> torch.Tensor:
    """``x @ W.T`` for x [M, K] that :func:`takes_tiles` accepts.

    Args:
        x: [M, K].
        weight: The quantized matrix.
        side: Added before the result is rounded, or None; its rank must be a power of two.
        shape: Overrides :func:`tile_shape`.

    Returns:
        [M, N].
    """
    rows, (n, k) = x.shape[0], weight.shape
    small = not interpreting() and capability(x.device) == (7, 5)
    batch, tile, split, warps, stages = shape or tile_shape(rows, n, k, processor_count(x.device), small)
    y = torch.empty((split, rows, n), dtype=x.dtype if split == 1 else torch.float32, device=x.device)
    parts, _, ranks = (0, 0, 0) if side is None else side.projections.shape
    with launch_on(x):
        nf4_matmul_kernel[(triton.cdiv(n, tile), triton.cdiv(rows, batch), split)](
            x, weight.words(), *scale_arguments(weight), y, rows, n, k // 64, triton.cdiv(k // 64, split), x.stride(0),
            None if side is None else side.projections, None if side is None else side.b,
            0.0 if side is None else side.scale, parts, ranks, 0 if side is None else side.first,
            RANK=0 if side is None else side.b.shape[1], BLOCKSIZE=weight.blocksize, NESTED=weight.nested,
            NESTED_BLOCKSIZE=weight.nested_blocksize, PLAIN=interpreting(),
            LOOK_UP=look_up(weight, x.dtype),
            EARLY=split > 1 and overlaps_launches(x.device), BATCH=batch, ROWS=tile, STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
    return y[0] if split == 1 else add_parts(y, x.dtype)


def add_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of float32 ``parts`` [P, M, N] over P, rounded once, in one launch."""
    y = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    early = overlaps_launches(parts.device)
    with launch_on(parts):
        add_parts_kernel[(triton.cdiv(y.numel(), 1024),)](
            parts, y, y.numel(), PARTS=parts.shape[0], ROUND=must_round(dtype), EARLY=early, BLOCK=1024, num_warps=4,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return y


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
def decode_tile(words, code, table, dtype: tl.constexpr, LOOK_UP: tl.constexpr):
    """Values [R, 64] of words [R, 8], without their scales, rounded to ``dtype``."""
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_words(words, code, table, LOOK_UP)
    if LOOK_UP == "mixed":  # decode_words added 3 to the first four
        v0, v1, v2, v3 = v0 - 3.0, v1 - 3.0, v2 - 3.0, v3 - 3.0
    return tl.reshape(interleave_eight(v0, v1, v2, v3, v4, v5, v6, v7), [words.shape[0], 64]).to(dtype)


@triton.jit
def nf4_matmul_kernel(
    x, words, code, absmax, nested_code, nested_absmax, offset, y, m, n, k_blocks, part_blocks, stride_x,
    projections, side_b, side_scale, parts, ranks, first_rank, RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PLAIN: tl.constexpr,
    LOOK_UP: tl.constexpr,
    EARLY: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes a tile [ROWS, BATCH] of one part of the sum over K; y is [parts, m, n].

    A step is a block of 64 columns. Its scale is made of numbers that were loaded a step before (the nested scale and
    its code) and two steps before (which code), so that no step waits for memory; words and x come by the pipeline.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    table = lane_table(code, LOOK_UP)
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n - 1)
    batch = tl.minimum(tl.program_id(1) * BATCH + tl.arange(0, BATCH), m - 1)
    start = tl.minimum(tl.program_id(2) * part_blocks, k_blocks - 1)
    stop = tl.minimum(tl.program_id(2) * part_blocks + part_blocks, k_blocks)
    stop = tl.where(tl.program_id(2) * part_blocks < k_blocks, stop, start)
    ratio: tl.constexpr = BLOCKSIZE // 64
    first = row * k_blocks
    w_at = words + (row * (k_blocks * 8))[:, None] + tl.arange(0, 8)[None, :]
    x_at = x + batch[None, :].to(tl.int64) * stride_x + tl.arange(0, 64)[:, None]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    if NESTED:
        shift = tl.load(offset)
        entry = load_from(nested_code, load_from(absmax, (first + start) // ratio, True, PLAIN), False, PLAIN)
        nested = load_from(nested_absmax, (first + start) // ratio // NESTED_BLOCKSIZE, False, PLAIN)
        index = load_from(absmax, (first + tl.minimum(start + 1, k_blocks - 1)) // ratio, True, PLAIN)
    else:
        entry = load_from(absmax, (first + start) // ratio, False, PLAIN)
    for block in tl.range(start, stop, num_stages=STAGES):
        packed = tl.load(w_at + block * 8)
        activation = tl.load(x_at + block * 64)
        following = (first + tl.minimum(block + 1, k_blocks - 1)) // ratio
        if NESTED:
            scale = entry * nested + shift
            entry = load_from(nested_code, index, False, PLAIN)
            nested = load_from(nested_absmax, following // NESTED_BLOCKSIZE, False, PLAIN)
            index = load_from(absmax, (first + tl.minimum(block + 2, k_blocks - 1)) // ratio, True, PLAIN)
        else:
            scale = entry
            entry = load_from(absmax, following, False, PLAIN)
        tile = decode_tile(packed, code, table, dtype, LOOK_UP)
        if PLAIN:
            part = tl.dot(tile.to(tl.float32), activation.to(tl.float32))
        else:
            part = tl.dot(tile, activation)
        total += part * scale[:, None]
    if RANK:
        rank = tl.arange(0, RANK)
        t_at = projections + (batch * ranks)[None, :] + (first_rank + rank)[:, None]
        t = tl.zeros((RANK, BATCH), tl.float32)
        for i in range(parts):
            t += tl.load(t_at + i * (m * ranks))
        b = tl.load(side_b + (row * RANK)[:, None] + rank[None, :])
        t = t.to(dtype)
        if PLAIN:
            part = tl.dot(b.to(tl.float32), t.to(tl.float32))
        else:
            part = tl.dot(b, t)
        total += part * tl.where(tl.program_id(2) == 0, side_scale, 0.0)
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    out = (tl.program_id(2).to(tl.int64) * m + batch[None, :]) * n + row[:, None]
    tl.store(y + out, total.to(y.dtype.element_ty), (batch[None, :] < m) & (row[:, None] < n))


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
    ptr = f"*{float_dtype}"
    vector = scale_signature() | {"x": ptr, "y": ptr} | dict.fromkeys(("n", "k_blocks", "stride_x", "stride_y"), "i32")
    matrix = scale_signature() | {"x": ptr, "y": "*fp32", "projections": "*fp32", "side_b": ptr, "side_scale": "fp32"}
    matrix |= dict.fromkeys(("m", "n", "k_blocks", "part_blocks", "stride_x", "parts", "ranks", "first_rank"), "i32")
    constants = {"BLOCKSIZE": 64, "NESTED": True, "NESTED_BLOCKSIZE": 256, "LOOK_UP": "mixed"}
    examples = []
    for batch in (1, 4):
        rows, blocks, warps = matvec_shape(batch, 14336, 4096)
        shape = {**constants, "BATCH": batch, "ROWS": rows, "BLOCKS": blocks}
        examples.append((nf4_matvec_kernel, vector, shape, {"num_warps": warps}))
    signature = {"parts": "*fp32", "y": ptr, "size": "i32"}
    examples.append(
        (add_parts_kernel, signature, {"PARTS": 4, "ROUND": False, "EARLY": False, "BLOCK": 1024}, {"num_warps": 4})
    )
    small = float_dtype == "fp16"
    for rows, rank, nested in ((32, 32, True), (128, 0, False)):
        batch, tile, _, warps, stages = tile_shape(rows, 14336, 4096, 132, small)
        shape = {**constants, "NESTED": nested, "RANK": rank, "PLAIN": False, "EARLY": False, "BATCH": batch}
        shape |= {"ROWS": tile, "STAGES": stages}
        types = matrix if nested else {**matrix, "absmax": "*fp32"}
        examples.append((nf4_matmul_kernel, types, shape, {"num_warps": warps}))
    return examples
