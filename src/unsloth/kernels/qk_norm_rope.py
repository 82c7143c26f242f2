"""RMS normalization of every query and key head, then rotary position embedding, in one pass (Qwen3, Gemma 3).

For each head vector x of dimension D, with its own weight for queries and for keys::

    n = x * rsqrt(mean(x^2) + eps) * (offset + weight)
    y = R n

R is the rotation of :mod:`unsloth.kernels.rope`. Arithmetic is float32 and rounded once, where separate operations
round n as well. Backward, with r = rsqrt(mean(x^2) + eps), dn = transpose(R) dy and g = dn * (offset + weight)::

    dx = r * g - x * r^3 * sum(g * x) / D         dweight = sum over rows of dn * x * r

r is recomputed, so q and k as they came from the projections are all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra.cuda import gdc_launch_dependents

from unsloth.core.errors import ConfigError
from unsloth.kernels.column_sum import column_sum
from unsloth.kernels.dispatch import (
    can_launch,
    check_shape,
    check_tensors,
    launch_on,
    overlaps_launches,
    processor_count,
)
from unsloth.kernels.rms_norm import rms_norm_reference
from unsloth.kernels.rope import (
    RopeTables,
    check_writable,
    launch_shape,
    load_angles,
    load_pairs,
    rope_reference,
    row_places,
    store_pairs,
)

HEADS = 8  # heads that a program of the backward goes through with one tile of angles
PROGRAMS = 4  # programs a multiprocessor where programs loop, to sum the weights' gradients


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    positions: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize and rotate queries and keys.

    Args:
        q: Queries [B, H, T, D], any strides.
        k: Keys [B, Hk, T, D] of q's dtype.
        q_weight: Norm weight of the queries, [D].
        k_weight: Norm weight of the keys, [D].
        cos: Table of cosines, as in :func:`unsloth.kernels.rope.rope`.
        sin: Table of sines.
        eps: Added to the mean square.
        offset: Added to the weights (1 for Gemma).
        positions: As in rope.
        rotary_dim: As in rope.
        interleaved: As in rope.
        inplace: Overwrite q and k; refused while they or the weights require gradients, which need the old values.
        fast: False takes the plain-torch reference.

    Returns:
        ``(q, k)`` normalized and rotated, with the shapes, dtypes and strides of the inputs.
    """
    tables = RopeTables.check(q, k, cos, sin, positions, rotary_dim, interleaved)
    check_tensors("qk_norm_rope", q=q, q_weight=q_weight, k_weight=k_weight)
    check_shape("qk_norm_rope", "q_weight", q_weight, tuple(q.shape[-1:]))
    check_shape("qk_norm_rope", "k_weight", k_weight, tuple(q.shape[-1:]))
    if inplace:
        check_writable("qk_norm_rope", q, k)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, q_weight, k_weight)):
            raise ConfigError("qk_norm_rope: inplace would lose what the gradient needs", do="Leave inplace off.")
    if not (fast and can_launch(q, k, q_weight, k_weight) and can_launch(cos, sin)):
        outs = qk_norm_rope_reference(q, k, q_weight, k_weight, tables, eps, offset)
        return tuple(x.copy_(out) for x, out in zip((q, k), outs, strict=True)) if inplace else outs
    if q_weight.stride(0) != 1 or k_weight.stride(0) != 1:
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    if inplace:
        _forward(q, k, q_weight, k_weight, tables, eps, offset, q, k)
        return q, k
    return _NormRope.apply(q, k, q_weight, k_weight, tables, eps, offset)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    tables: RopeTables,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch: normalization, rounded, then rotation."""
    cos, sin = tables.by_token()
    normed = rms_norm_reference(q, q_weight, eps, offset), rms_norm_reference(k, k_weight, eps, offset)
    return tuple(rope_reference(x, cos, sin, tables.rotary_dim, tables.interleaved) for x in normed)


def _grid(q: torch.Tensor, k: torch.Tensor, rows: int) -> tuple[int, int, int, int]:
    q_rows, k_rows = (x.numel() // x.shape[-1] for x in (q, k))
    return q_rows, k_rows, triton.cdiv(q_rows, rows), triton.cdiv(k_rows, rows)


def _shape(q: torch.Tensor, tables: RopeTables, choose: Callable[[int], tuple[int, int, int]]) -> tuple[dict, int]:
    block, rows, warps = choose(tables.rotary_dim // 2)
    rest = q.shape[-1] - tables.rotary_dim
    constants = {
        "HALF": tables.rotary_dim // 2, "PAIR_STEP": tables.pair_step(), "INTERLEAVED": tables.interleaved,
        "REST": rest, "POSITIONS": tables.positions is not None, "ROWS": rows, "BLOCK": block,
        "REST_BLOCK": triton.next_power_of_2(max(rest, 1)), "num_warps": warps,
    }  # fmt: skip
    return constants, rows


def _forward(q, k, q_weight, k_weight, tables: RopeTables, eps, offset, q_out, k_out) -> None:
    constants, rows = _shape(q, tables, launch_shape)
    q_rows, k_rows, q_tiles, k_tiles = _grid(q, k, rows)
    if not q_tiles + k_tiles:
        return
    with launch_on(q):
        qk_norm_rope_forward_kernel[(q_tiles + k_tiles,)](
            q, k, q_weight, k_weight, q_out, k_out, tables.cos, tables.sin, tables.positions, q_rows, k_rows, q_tiles,
            q.shape[2], q.shape[1], k.shape[1], *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(),
            *tables.strides(), tables.cos.shape[0], eps, offset, **constants,
        )  # fmt: skip


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, tables, eps, offset):
        ctx.save_for_backward(q, k, q_weight, k_weight)
        ctx.tables, ctx.eps, ctx.offset = tables, eps, offset
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        _forward(q, k, q_weight, k_weight, tables, eps, offset, q_out, k_out)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        q, k, q_weight, k_weight = ctx.saved_tensors
        tables = ctx.tables
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        constants, rows = _shape(q, tables, launch_shape if wanted else backward_shape)
        tiles = triton.cdiv(q.shape[0] * q.shape[2], rows)
        q_programs, k_programs = (tiles * triton.cdiv(x.shape[1], HEADS) for x in (q, k))
        dq, dk, partial = torch.empty_like(q), torch.empty_like(k), None
        if wanted:
            q_programs, k_programs = _share_programs(q_programs, k_programs, q.device)
            constants["num_stages"] = 4
            partial = torch.empty((q_programs + k_programs, q.shape[-1]), dtype=torch.float32, device=q.device)
        if q_programs + k_programs:
            with launch_on(q):
                qk_norm_rope_backward_kernel[(q_programs + k_programs,)](
                    dq_out, dk_out, q, k, q_weight, k_weight, dq, dk, partial, tables.cos, tables.sin,
                    tables.positions, q.shape[0] * q.shape[2], q_programs, k_programs, q.shape[2], q.shape[1],
                    k.shape[1],
                    *dq_out.stride(), *dk_out.stride(), *q.stride(), *k.stride(), *dq.stride(), *dk.stride(),
                    *tables.strides(), tables.cos.shape[0], ctx.eps, ctx.offset, WEIGHT_GRAD=wanted,
                    EARLY=wanted and overlaps_launches(q.device), HEADS=HEADS,
                    **constants,
                )  # fmt: skip
        if not wanted:
            return dq, dk, None, None, None, None, None
        dtype = torch.promote_types(q_weight.dtype, k_weight.dtype)
        dq_weight, dk_weight = column_sum(partial, dtype, q_programs)
        return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None


def backward_shape(half: int) -> tuple[int, int, int]:
    """Pairs of a tile, tokens of a tile, warps: 8 pairs a thread."""
    block = triton.next_power_of_2(half)
    return block, max(1, 512 // block), 2


def _share_programs(q_tiles: int, k_tiles: int, device: torch.device) -> tuple[int, int]:
    """Programs for queries and for keys, in proportion to their tiles, that fill the device once."""
    budget = PROGRAMS * processor_count(device)
    total = q_tiles + k_tiles
    if total <= budget:
        return q_tiles, k_tiles
    k_programs = max(1, k_tiles * budget // total)
    return budget - k_programs, k_programs


@triton.jit
def norm_rotate_rows(
    x, weight, y, cos, sin, positions, tile, rows, tokens, heads, x_sb, x_sh, x_st, x_sd, y_sb, y_sh, y_st, y_sd,
    table_sb, table_st, position_sb, position_st, table_rows, eps, offset,
    HALF: tl.constexpr, PAIR_STEP: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate the rows of one tile."""
    batch, head, token, live = row_places(tile, rows, tokens, heads, ROWS)
    x_row = x + batch * x_sb + head * x_sh + token * x_st
    y_row = y + batch * y_sb + head * y_sh + token * y_st
    x1, x2 = load_pairs(x_row, x_sd, live, HALF, BLOCK, INTERLEAVED)
    square = tl.sum(x1 * x1 + x2 * x2, 1)[:, None]
    extra = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    kept = live & (extra < 2 * HALF + REST)
    if REST:
        x3 = tl.load(x_row + extra * x_sd, kept, other=0.0).to(tl.float32)
        square += tl.sum(x3 * x3, 1)[:, None]
    scale = tl.rsqrt(square / (2 * HALF + REST) + eps)
    w1, w2 = load_pairs(weight + tl.zeros((1, 1), tl.int32), 1, True, HALF, BLOCK, INTERLEAVED)
    x1 = x1 * scale * (w1 + offset)
    x2 = x2 * scale * (w2 + offset)
    c, s = load_angles(
        cos, sin, positions, batch, token, live, table_sb, table_st, position_sb, position_st, table_rows, HALF,
        PAIR_STEP, POSITIONS, BLOCK,
    )  # fmt: skip
    store_pairs(y_row, y_sd, x1 * c - x2 * s, x2 * c + x1 * s, live, HALF, BLOCK, INTERLEAVED)
    if REST:
        gain = tl.load(weight + extra, extra < 2 * HALF + REST, other=0.0).to(tl.float32) + offset
        tl.store(y_row + extra * y_sd, (x3 * scale * gain).to(y.dtype.element_ty), kept)


@triton.jit
def norm_rotate_backward(
    dy, x, weight, dx, partial, cos, sin, positions, first, step, rows, tokens, heads,
    dy_sb, dy_sh, dy_st, dy_sd, x_sb, x_sh, x_st, x_sd, dx_sb, dx_sh, dx_st, dx_sd,
    table_sb, table_st, position_sb, position_st, table_rows, eps, offset, WEIGHT_GRAD: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, PAIR_STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of every step-th tile of ROWS tokens and HEADS heads, and those tiles' share of the weight's."""
    w1, w2 = load_pairs(weight + tl.zeros((1, 1), tl.int32), 1, True, HALF, BLOCK, INTERLEAVED)
    w1 += offset
    w2 += offset
    extra = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    beyond = extra < 2 * HALF + REST
    sum1 = tl.zeros((ROWS, BLOCK), tl.float32)
    sum2 = tl.zeros((ROWS, BLOCK), tl.float32)
    sum3 = tl.zeros((ROWS, REST_BLOCK), tl.float32)
    groups = tl.cdiv(heads, HEADS)
    for item in range(first, tl.cdiv(rows, ROWS) * groups, step):
        row = (item // groups) * ROWS + tl.arange(0, ROWS)[:, None]
        live = row < rows
        batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        first_head = (item % groups) * HEADS
        dy_row = dy + batch * dy_sb + token * dy_st
        x_row = x + batch * x_sb + token * x_st
        dx_row = dx + batch * dx_sb + token * dx_st
        c, s = load_angles(
            cos, sin, positions, batch, token, live, table_sb, table_st, position_sb, position_st, table_rows, HALF,
            PAIR_STEP, POSITIONS, BLOCK,
        )  # fmt: skip
        for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
            x1, x2 = load_pairs(x_row + head * x_sh, x_sd, live, HALF, BLOCK, INTERLEAVED)
            d1, d2 = load_pairs(dy_row + head * dy_sh, dy_sd, live, HALF, BLOCK, INTERLEAVED)
            n1 = d1 * c + d2 * s
            n2 = d2 * c - d1 * s
            g1, g2 = n1 * w1, n2 * w2
            square = tl.sum(x1 * x1 + x2 * x2, 1)[:, None]
            dot = tl.sum(g1 * x1 + g2 * x2, 1)[:, None]
            if REST:
                w3 = tl.load(weight + extra, beyond, other=0.0).to(tl.float32) + offset
                x3 = tl.load(x_row + head * x_sh + extra * x_sd, live & beyond, other=0.0).to(tl.float32)
                n3 = tl.load(dy_row + head * dy_sh + extra * dy_sd, live & beyond, other=0.0).to(tl.float32)
                square += tl.sum(x3 * x3, 1)[:, None]
                dot += tl.sum(n3 * w3 * x3, 1)[:, None]
            scale = tl.rsqrt(square / (2 * HALF + REST) + eps)
            shrink = scale * scale * scale * dot / (2 * HALF + REST)
            y1, y2 = scale * g1 - x1 * shrink, scale * g2 - x2 * shrink
            store_pairs(dx_row + head * dx_sh, dx_sd, y1, y2, live, HALF, BLOCK, INTERLEAVED)
            if REST:
                y3 = (scale * n3 * w3 - x3 * shrink).to(dx.dtype.element_ty)
                tl.store(dx_row + head * dx_sh + extra * dx_sd, y3, live & beyond)
            if WEIGHT_GRAD:
                sum1 += n1 * (x1 * scale)
                sum2 += n2 * (x2 * scale)
                if REST:
                    sum3 += n3 * (x3 * scale)
    if WEIGHT_GRAD:
        place = partial + tl.zeros((1, 1), tl.int32)
        store_pairs(place, 1, tl.sum(sum1, 0)[None, :], tl.sum(sum2, 0)[None, :], True, HALF, BLOCK, INTERLEAVED)
        if REST:
            tl.store(partial + extra, tl.sum(sum3, 0)[None, :], beyond)


@triton.jit
def qk_norm_rope_forward_kernel(
    q, k, q_weight, k_weight, q_out, k_out, cos, sin, positions, q_rows, k_rows, q_tiles, tokens, q_heads, k_heads,
    q_sb, q_sh, q_st, q_sd, k_sb, k_sh, k_st, k_sd, qo_sb, qo_sh, qo_st, qo_sd, ko_sb, ko_sh, ko_st, ko_sd,
    table_sb, table_st, position_sb, position_st, table_rows, eps, offset,
    HALF: tl.constexpr, PAIR_STEP: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of query rows in the first q_tiles programs, of key rows in the others."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        norm_rotate_rows(
            q, q_weight, q_out, cos, sin, positions, tile, q_rows, tokens, q_heads, q_sb, q_sh, q_st, q_sd, qo_sb,
            qo_sh, qo_st, qo_sd, table_sb, table_st, position_sb, position_st, table_rows, eps, offset, HALF,
            PAIR_STEP, INTERLEAVED, REST, POSITIONS, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        norm_rotate_rows(
            k, k_weight, k_out, cos, sin, positions, tile - q_tiles, k_rows, tokens, k_heads, k_sb, k_sh, k_st, k_sd,
            ko_sb, ko_sh, ko_st, ko_sd, table_sb, table_st, position_sb, position_st, table_rows, eps, offset, HALF,
            PAIR_STEP, INTERLEAVED, REST, POSITIONS, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip


@triton.jit
def qk_norm_rope_backward_kernel(
    dq_out, dk_out, q, k, q_weight, k_weight, dq, dk, partial, cos, sin, positions, rows, q_programs, k_programs,
    tokens, q_heads, k_heads, dqo_sb, dqo_sh, dqo_st, dqo_sd, dko_sb, dko_sh, dko_st, dko_sd,
    q_sb, q_sh, q_st, q_sd, k_sb, k_sh, k_st, k_sd, dq_sb, dq_sh, dq_st, dq_sd, dk_sb, dk_sh, dk_st, dk_sd,
    table_sb, table_st, position_sb, position_st, table_rows, eps, offset, WEIGHT_GRAD: tl.constexpr,
    EARLY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PAIR_STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Query rows in the first q_programs programs, key rows in the others; partial is [programs, D] float32."""
    program = tl.program_id(0)
    if WEIGHT_GRAD:
        partial += program.to(tl.int64) * (2 * HALF + REST)
    if program < q_programs:
        norm_rotate_backward(
            dq_out, q, q_weight, dq, partial, cos, sin, positions, program, q_programs, rows, tokens, q_heads,
            dqo_sb, dqo_sh, dqo_st, dqo_sd, q_sb, q_sh, q_st, q_sd, dq_sb, dq_sh, dq_st, dq_sd, table_sb, table_st,
            position_sb, position_st, table_rows, eps, offset, WEIGHT_GRAD, HEADS, HALF, PAIR_STEP, INTERLEAVED,
            REST, POSITIONS, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        norm_rotate_backward(
            dk_out, k, k_weight, dk, partial, cos, sin, positions, program - q_programs, k_programs, rows, tokens,
            k_heads, dko_sb, dko_sh, dko_st, dko_sd, k_sb, k_sh, k_st, k_sd, dk_sb, dk_sh, dk_st, dk_sd, table_sb,
            table_st, position_sb, position_st, table_rows, eps, offset, WEIGHT_GRAD, HEADS, HALF, PAIR_STEP,
            INTERLEAVED, REST, POSITIONS, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    block, rows, warps = launch_shape(64)
    shape = {"HALF": 64, "PAIR_STEP": 1, "INTERLEAVED": False, "REST": 0, "POSITIONS": True, "ROWS": rows}
    shape |= {"BLOCK": block, "REST_BLOCK": 1}
    examples = []
    for kernel, constants in (
        (qk_norm_rope_forward_kernel, shape),
        (
            qk_norm_rope_backward_kernel,
            {**shape, "WEIGHT_GRAD": True, "EARLY": False, "HEADS": HEADS},
        ),
    ):
        names = [name for name in kernel.arg_names if name not in constants]
        signature = dict.fromkeys(names, "i32") | dict.fromkeys(("eps", "offset"), "fp32")
        floats = ("q", "k", "q_weight", "k_weight", "q_out", "k_out", "dq_out", "dk_out", "dq", "dk")
        signature |= {name: f"*{float_dtype}" for name in names if name in floats}
        signature |= {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "partial": "*fp32"}
        units = {name: 1 for name in names if name.endswith("_sd")}
        examples.append((kernel, signature, {**constants, **units}, {"num_warps": warps}))
    return examples
