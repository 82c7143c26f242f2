"""Rotary position embedding of queries and keys in one launch.

With x1, x2 the two members of a pair, and c, s the cosine and sine of its angle at the token's position::

    y1 = x1 * c - x2 * s                          y2 = x2 * c + x1 * s

Pairs are (i, i + R/2) in the layout of Llama and its kin, and (2i, 2i + 1) where ``interleaved``; R is the number of
rotated dimensions, and dimensions past R are copied (partial rotary). The gradient is the same map with -s. Every
scaling method (linear, dynamic, YaRN, Llama 3, LongRoPE, sections for vision) comes in through the tables: see
:func:`rope_tables`. Arithmetic is float32, rounded once. Su et al., "RoFormer", 2021.

Shapes: B batch, H heads, T tokens, D head dimension, R rotated dimensions, P table rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import can_launch, check_tensors, compute_dtype, launch_on


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate queries and keys.

    Args:
        q: Queries [B, H, T, D]; any strides, so a transposed [B, T, H, D] is as fast.
        k: Keys [B, Hk, T, D] of q's dtype, or None.
        cos: Table of cosines, times the attention factor if there is one. [T, W], [1, T, W] or [B, T, W] by token, or
            [P, W] where ``positions`` is given. W is R/2, or R with both halves of a pair filled equally, as
            transformers makes it.
        sin: Table of sines, like cos.
        positions: Integer row of the table for each token, [T], [1, T] or [B, T]; for packed documents it starts
            again at 0 with each. A position outside the table yields NaN on the GPU and an error on the CPU.
        rotary_dim: R; None means W.
        interleaved: Which dimensions form a pair, see above.
        inplace: Overwrite q and k, and return them.
        fast: False takes the plain-torch reference.

    Returns:
        ``(q, k)`` rotated, with the shapes, dtypes and strides of the inputs.
    """
    tables = RopeTables.check(q, k, cos, sin, positions, rotary_dim, interleaved)
    if inplace:
        check_writable("rope", q, k)
    if not (fast and can_launch(q, k) and can_launch(cos, sin)):
        return _by_reference(q, k, tables, inplace)
    if inplace:
        return _RopeInPlace.apply(q, tables), None if k is None else _RopeInPlace.apply(k, tables)
    return _Rope.apply(q, k, tables)


def rope_tables(
    inv_freq: torch.Tensor, positions: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``positions * inv_freq`` in float32, times the attention factor.

    Args:
        inv_freq: Inverse frequencies [R/2], after whatever scaling the model asks for.
        positions: Positions, of any shape.
        attention_factor: Multiplies both tables (YaRN, LongRoPE).

    Returns:
        ``(cos, sin)`` of shape [*positions.shape, R/2]; pass them to :func:`rope` with ``rotary_dim=R``.
    """
    angle = positions.to(torch.float32)[..., None] * inv_freq.to(positions.device, torch.float32)
    return angle.cos() * attention_factor, angle.sin() * attention_factor


class RopeTables:
    """Checked tables in the form that the kernels read: one row of cos and sin for each token.

    Attributes:
        cos: [P, W], or [B, T, W] seen with the strides ``batch_stride`` and ``token_stride``.
        sin: As cos.
        positions: [B, T] (possibly expanded), or None.
        rotary_dim: R.
        interleaved: Whether pairs are (2i, 2i + 1).
    """

    def __init__(self, cos, sin, positions, rotary_dim, interleaved):
        self.cos, self.sin, self.positions = cos, sin, positions
        self.rotary_dim, self.interleaved = rotary_dim, interleaved

    @classmethod
    def check(cls, q, k, cos, sin, positions, rotary_dim, interleaved) -> RopeTables:
        """Validate the arguments of :func:`rope`, and bring the tables to [B, T, W] or [P, W] with [B, T] positions."""
        check_tensors("rope", q=q, k=k, cos=cos, sin=sin)
        _check_heads(q, k)
        if cos.dim() < 2:
            raise ConfigError("rope: the table has no rows", got=tuple(cos.shape), do="Pass [tokens, W].")
        b, _, t, d = q.shape
        width = cos.shape[-1]
        rotary_dim = width if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= d or width not in (rotary_dim, rotary_dim // 2):
            do = f"R must be even, at most {d}, and the table R or R/2 wide."
            raise ConfigError("rope: table and rotary_dim do not fit", got=(width, rotary_dim), do=do)
        if cos.shape != sin.shape:
            raise ConfigError(
                "rope: cos and sin differ", got=(tuple(cos.shape), tuple(sin.shape)), do="Pass equal shapes."
            )
        if positions is not None:
            positions = _check_positions(positions, cos, b, t)
        else:
            try:
                cos, sin = cos.expand(b, t, width), sin.expand(b, t, width)
            except RuntimeError:
                do = f"Pass [{t}, W], [1, {t}, W] or [{b}, {t}, W], or positions with a table."
                raise ConfigError("rope: table has the wrong shape", got=tuple(cos.shape), do=do) from None
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        return cls(cos, sin, positions, rotary_dim, interleaved)

    def strides(self) -> tuple[int, int, int, int]:
        """Strides of the table by batch and by row, and of the positions by batch and by token."""
        if self.positions is None:
            return self.cos.stride(0), self.cos.stride(1), 0, 0
        return 0, self.cos.stride(0), self.positions.stride(0), self.positions.stride(1)

    def pair_step(self) -> int:
        """Distance in the table between the entries of neighbouring pairs."""
        return 2 if self.interleaved and self.cos.shape[-1] == self.rotary_dim else 1

    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, T, R/2]."""
        cos, sin = (x if self.positions is None else x[self.positions.long()] for x in (self.cos, self.sin))
        step, half = self.pair_step(), self.rotary_dim // 2
        return cos[..., : half * step : step], sin[..., : half * step : step]


def rope_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, interleaved: bool = False
) -> torch.Tensor:
    """The formula in plain torch for x [B, H, T, D] and tables [B, T, R/2]."""
    wide = x.to(compute_dtype(x.dtype))
    c, s = (table.to(wide.dtype)[:, None] for table in (cos, sin))
    rotated, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    if interleaved:
        x1, x2 = rotated[..., ::2], rotated[..., 1::2]
        y = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).flatten(-2)
    else:
        x1, x2 = rotated.chunk(2, -1)
        y = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
    return torch.cat((y, rest), -1).to(x.dtype)


def rope_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    tables: RopeTables,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    backward: bool = False,
) -> None:
    """Launch the kernel: rotate q into q_out and k into k_out (each may be its input); ``backward`` rotates back."""
    b, heads, t, d = q.shape
    q_rows, k_rows = b * heads * t, 0 if k is None else k.numel() // d
    if not q_rows + k_rows:
        return
    half = tables.rotary_dim // 2
    copied = 0 if q_out.data_ptr() == q.data_ptr() else d - tables.rotary_dim
    block, rows, warps = launch_shape(half)
    q_tiles = triton.cdiv(q_rows, rows)
    if k is None or k_out is None:
        k, k_out = q, q_out
    with launch_on(q):
        rope_kernel[(q_tiles + triton.cdiv(k_rows, rows),)](
            q, k, q_out, k_out, tables.cos, tables.sin, tables.positions, q_rows, k_rows, q_tiles, t, heads, k.shape[1],
            *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(), *tables.strides(), tables.cos.shape[0],
            HALF=half, PAIR_STEP=tables.pair_step(), INTERLEAVED=tables.interleaved, REST=copied,
            POSITIONS=tables.positions is not None, BACKWARD=backward, ROWS=rows, BLOCK=block,
            REST_BLOCK=triton.next_power_of_2(max(copied, 1)), num_warps=warps,
        )  # fmt: skip


def check_writable(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise if elements of a tensor share memory, so that it cannot be overwritten."""
    for x in tensors:
        if x is not None and any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            do = "Clone it, or leave inplace off."
            raise ConfigError(
                f"{op}: an expanded tensor cannot be overwritten", got=(tuple(x.shape), x.stride()), do=do
            )


def launch_shape(half: int) -> tuple[int, int, int]:
    """Pairs of a tile, (token, head) rows of a tile, warps: 8 pairs a thread."""
    block = triton.next_power_of_2(half)
    return block, max(1, 1024 // block), 4


def _check_heads(q: torch.Tensor, k: torch.Tensor | None) -> None:
    if q.dim() != 4:
        raise ConfigError("rope: q is not [batch, heads, tokens, dim]", got=tuple(q.shape), do="Pass four dimensions.")
    if k is not None and (k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or k.dtype != q.dtype):
        do = f"Pass keys of {q.dtype} with shape [{q.shape[0]}, heads, {q.shape[2]}, {q.shape[3]}]."
        raise ConfigError("rope: k does not fit q", got=(tuple(k.shape), k.dtype), do=do)


def _check_positions(positions: torch.Tensor, cos: torch.Tensor, b: int, t: int) -> torch.Tensor:
    if positions.dtype not in (torch.int32, torch.int64) or positions.device != cos.device:
        do = f"Pass int32 or int64 on {cos.device}."
        raise ConfigError("rope: positions unusable", got=(positions.dtype, str(positions.device)), do=do)
    if cos.dim() != 2:
        raise ConfigError("rope: positions need one table", got=tuple(cos.shape), do="Pass cos and sin as [P, W].")
    try:
        positions = positions.expand(b, t)
    except RuntimeError:
        do = f"Pass [{t}], [1, {t}] or [{b}, {t}]."
        raise ConfigError("rope: positions have the wrong shape", got=tuple(positions.shape), do=do) from None
    if not positions.is_cuda and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise ConfigError("rope: position outside the table", got=(low, high), do=f"It has {cos.shape[0]} rows.")
    return positions


def _by_reference(q, k, tables: RopeTables, inplace: bool):
    cos, sin = tables.by_token()
    outs = [None if x is None else rope_reference(x, cos, sin, tables.rotary_dim, tables.interleaved) for x in (q, k)]
    if inplace:
        outs = [None if x is None else x.copy_(out) for x, out in zip((q, k), outs, strict=True)]
    return tuple(outs)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, tables):
        ctx.tables = tables
        ctx.set_materialize_grads(False)
        q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
        rope_forward(q, k, tables, q_out, k_out)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq_in, dk_in = (None if g is None else torch.empty_like(g) for g in (dq, dk))
        if dq is not None:
            rope_forward(dq, dk, ctx.tables, dq_in, dk_in, backward=True)
        elif dk is not None:
            rope_forward(dk, None, ctx.tables, dk_in, None, backward=True)
        return dq_in, dk_in, None


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tables):
        ctx.tables = tables
        ctx.mark_dirty(x)
        rope_forward(x, None, tables, x, None)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = torch.empty_like(dy)
        rope_forward(dy, None, ctx.tables, dx, None, backward=True)
        return dx, None


@triton.jit
def rope_kernel(
    q, k, q_out, k_out, cos, sin, positions, q_rows, k_rows, q_tiles, tokens, q_heads, k_heads,
    q_sb, q_sh, q_st, q_sd, k_sb, k_sh, k_st, k_sd,
    qo_sb, qo_sh, qo_st, qo_sd, ko_sb, ko_sh, ko_st, ko_sd,
    table_sb, table_st, position_sb, position_st, table_rows,
    HALF: tl.constexpr, PAIR_STEP: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    POSITIONS: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program rotates ROWS (token, head) rows: of q in the first q_tiles programs, of k in the others."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        rotate_rows(
            q, q_out, cos, sin, positions, tile, q_rows, tokens, q_heads, q_sb, q_sh, q_st, q_sd, qo_sb, qo_sh, qo_st,
            qo_sd, table_sb, table_st, position_sb, position_st, table_rows, HALF, PAIR_STEP, INTERLEAVED, REST,
            POSITIONS, BACKWARD, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        rotate_rows(
            k, k_out, cos, sin, positions, tile - q_tiles, k_rows, tokens, k_heads, k_sb, k_sh, k_st, k_sd, ko_sb,
            ko_sh, ko_st, ko_sd, table_sb, table_st, position_sb, position_st, table_rows, HALF, PAIR_STEP,
            INTERLEAVED, REST, POSITIONS, BACKWARD, ROWS, BLOCK, REST_BLOCK,
        )  # fmt: skip


@triton.jit
def row_places(tile, rows, tokens, heads, ROWS: tl.constexpr):
    """Batch, head and token of the rows of a tile, counted head by head, then token by token; and which exist."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    head = row % heads
    token = ((row // heads) % tokens).to(tl.int64)
    return (row // (heads * tokens)).to(tl.int64), head, token, row < rows


@triton.jit
def load_pairs(x_row, stride, live, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second members of the pairs of a tile's rows in float32, zero past the end, each [ROWS, BLOCK]."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(x_row + column * stride, live & (column < 2 * HALF), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(both, [both.shape[0], BLOCK, 2]))
    else:
        pair = tl.arange(0, BLOCK)[None, :]
        mask = live & (pair < HALF)
        x1 = tl.load(x_row + pair * stride, mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row + (pair + HALF) * stride, mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def store_pairs(y_row, stride, y1, y2, live, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The counterpart of load_pairs."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.interleave(y1, y2).to(y_row.dtype.element_ty)
        tl.store(y_row + column * stride, both, live & (column < 2 * HALF))
    else:
        pair = tl.arange(0, BLOCK)[None, :]
        mask = live & (pair < HALF)
        tl.store(y_row + pair * stride, y1.to(y_row.dtype.element_ty), mask)
        tl.store(y_row + (pair + HALF) * stride, y2.to(y_row.dtype.element_ty), mask)


@triton.jit
def load_angles(
    cos, sin, positions, batch, token, live, table_sb, table_st, position_sb, position_st, table_rows,
    HALF: tl.constexpr, PAIR_STEP: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a tile's pairs, zero past its end; cosines are NaN at a position outside the table."""
    pair = tl.arange(0, BLOCK)[None, :]
    entry = batch * table_sb + token * table_st
    found = live & (pair < HALF)
    missing = 0.0
    if POSITIONS:
        position = tl.load(positions + batch * position_sb + token * position_st, live, other=0).to(tl.int64)
        entry = position * table_st
        known = (position >= 0) & (position < table_rows)
        found = found & known
        missing = tl.where(known, 0.0, float("nan"))
    c = tl.load(cos + entry + pair * PAIR_STEP, found, other=0.0).to(tl.float32) + missing
    s = tl.load(sin + entry + pair * PAIR_STEP, found, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def rotate_rows(
    x, y, cos, sin, positions, tile, rows, tokens, heads, x_sb, x_sh, x_st, x_sd, y_sb, y_sh, y_st, y_sd,
    table_sb, table_st, position_sb, position_st, table_rows,
    HALF: tl.constexpr, PAIR_STEP: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    POSITIONS: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the rows of one tile."""
    batch, head, token, live = row_places(tile, rows, tokens, heads, ROWS)
    x_row = x + batch * x_sb + head * x_sh + token * x_st
    y_row = y + batch * y_sb + head * y_sh + token * y_st
    x1, x2 = load_pairs(x_row, x_sd, live, HALF, BLOCK, INTERLEAVED)
    c, s = load_angles(
        cos, sin, positions, batch, token, live, table_sb, table_st, position_sb, position_st, table_rows, HALF,
        PAIR_STEP, POSITIONS, BLOCK,
    )  # fmt: skip
    if BACKWARD:
        s = -s
    if REST:
        extra = tl.arange(0, REST_BLOCK)[None, :]
        kept = live & (extra < REST)
        value = tl.load(x_row + (2 * HALF + extra) * x_sd, kept)
        tl.store(y_row + (2 * HALF + extra) * y_sd, value, kept)
    store_pairs(y_row, y_sd, x1 * c - x2 * s, x2 * c + x1 * s, live, HALF, BLOCK, INTERLEAVED)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    ptr = f"*{float_dtype}"
    signature = dict.fromkeys(rope_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("q", "k", "q_out", "k_out"), ptr) | {"cos": "*fp32", "sin": "*fp32"}
    signature |= {"positions": "*i64"}
    block, rows, warps = launch_shape(64)
    shape = {"HALF": 64, "PAIR_STEP": 1, "REST": 0, "BACKWARD": False, "ROWS": rows, "BLOCK": block, "REST_BLOCK": 1}
    unit = {"q_sd": 1, "k_sd": 1, "qo_sd": 1, "ko_sd": 1}
    return [
        (rope_kernel, signature, {**shape, **unit, "INTERLEAVED": False, "POSITIONS": True}, {"num_warps": warps}),
        (rope_kernel, signature, {**shape, **unit, "INTERLEAVED": True, "POSITIONS": False}, {"num_warps": warps}),
    ]
