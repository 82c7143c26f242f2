"""RMS normalization of the last dimension, with an optional residual addition in the same pass.

    h = x + residual                              (add_rms_norm; otherwise h = x)
    y = h * rsqrt(mean(h^2) + eps) * (offset + weight)

offset is 0 for Llama and its kin, 1 where the checkpoint stores ``weight - 1`` (Gemma). All arithmetic is float32,
rounded once to x's dtype. With r = rsqrt(mean(h^2) + eps), g = dy * (offset + weight), N columns::

    dh = r * g - h * r^3 * sum(g * h) / N         dweight = sum over rows of dy * h * r

The backward recomputes r, which costs no extra pass, so h is all that is kept. Zhang and Sennrich, "Root Mean Square
Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unsloth.kernels.column_sum import column_sum
from unsloth.kernels.dispatch import (
    adjacent,
    as_rows,
    compute_dtype,
    early_launch,
    interpreting,
    launch_on,
    overlaps_launches,
    processor_count,
)
from unsloth.kernels.row_norm import (
    equal_shares,
    launch_shape,
    load_sum,
    result_buffers,
    row_stride,
    takes_kernel,
    two_sums,
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, fast: bool = True
) -> torch.Tensor:
    """Normalize the last dimension of ``x`` by its root mean square.

    Args:
        x: Floating-point tensor of shape [..., N].
        weight: Shape [N], any floating dtype; None for no weight.
        eps: Added to the mean square.
        offset: Added to the weight.
        fast: False takes the plain-torch reference.

    Returns:
        Tensor of x's shape and dtype.
    """
    if not (takes_kernel("rms_norm", x, weight=weight) and fast):
        return rms_norm_reference(x, weight, eps, offset)
    return _RMSNorm.apply(x, None, adjacent(weight), eps, offset)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` of ``h = x + residual`` in one pass over memory; residual is like x. Returns ``(y, h)``."""
    if not (takes_kernel("rms_norm", x, residual, weight=weight) and fast):
        h = x + residual
        return rms_norm_reference(h, weight, eps, offset), h
    return _RMSNorm.apply(x, residual, adjacent(weight), eps, offset)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The formula in plain torch, computed in float32 (float64 for float64 inputs)."""
    wide = x.to(compute_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y.to(x.dtype)


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel on matrices, without autograd.

    Args:
        x: [M, N] with adjacent columns.
        weight: [N] or None.
        eps: Added to the mean square.
        offset: Added to the weight.
        residual: [M, N] like x, or in float32; None for none.
        out: [M, N] with adjacent columns to write y into (for example columns of a wider buffer); None allocates.
        early: Launch while the kernel ahead is still at work, and wait for it there; for the short kernels of a
            decoding step, which take little longer than their launches.

    Returns:
        ``(y, h)``; h is x itself when there is no residual.
    """
    rows, n = x.shape
    y, h = result_buffers(x, residual, out)
    if y.numel() == 0:
        return y, h
    block, tile, warps = launch_shape(n)
    overlaps = overlaps_launches(x.device)
    early = early and overlaps
    with launch_on(x):
        rms_norm_forward_kernel[(triton.cdiv(rows, tile),)](
            x, residual, weight, y, h, rows, n, x.stride(0), row_stride(residual), y.stride(0),
            eps, offset, ADD=residual is not None, WEIGHT=weight is not None, LATE=early, EARLY=overlaps, ROWS=tile,
            BLOCK=block, num_warps=warps, **early_launch(early),
        )  # fmt: skip
    return y, h


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    dh: torch.Tensor | None = None,
    weight_grad: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernel on matrices.

    Args:
        dy: [M, N], gradient of y, with adjacent columns.
        h: [M, N], what was normalized.
        weight: [N] or None.
        eps: Added to the mean square.
        offset: Added to the weight.
        dh: [M, N], gradient that reaches h by other ways (the residual stream), or None.
        weight_grad: Whether to compute the weight's gradient.
        out: [M, N] contiguous, to write dx into; None allocates.

    Returns:
        ``(dx, dweight)``: the gradient of x (and of residual, which is the same), and that of the weight or None.
    """
    rows, n = h.shape
    dx = torch.empty((rows, n), dtype=h.dtype, device=h.device) if out is None else out
    weight_grad = weight_grad and weight is not None
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight) if weight_grad else None
    block, tile, warps = launch_shape(n)
    tiles = triton.cdiv(rows, tile)
    if weight_grad:
        per_processor, warps, stages = looped_shape(n, warps)
        programs = equal_shares(tiles, per_processor * processor_count(h.device))
    else:
        programs, warps, stages = tiles, max(1, warps // 2), 1
    partial = torch.empty((programs, n), dtype=torch.float32, device=h.device) if weight_grad else None
    with launch_on(h):
        rms_norm_backward_kernel[(programs,)](
            dy, h, weight, dh, dx, partial, rows, n, dy.stride(0), h.stride(0), row_stride(dh),
            eps, offset, WEIGHT=weight is not None, ADD=dh is not None, WEIGHT_GRAD=weight_grad,
            EARLY=weight_grad and overlaps_launches(h.device), TOGETHER=not interpreting(), STAGES=stages,
            ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, None if partial is None or weight is None else column_sum(partial, weight.dtype)


def looped_shape(n: int, warps: int) -> tuple[int, int, int]:
    """Where programs loop over tiles to sum a weight's gradient: programs a multiprocessor, warps, stages of loads."""
    return (1, warps, 4) if n <= 4096 else (2, warps, 3 if n <= 8192 else 1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        rows = None if residual is None else as_rows(residual)
        y, h = rms_norm_forward(as_rows(x), weight, eps, offset, rows, early=not any(ctx.needs_input_grad))
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.offset, ctx.added = eps, offset, residual is not None
        ctx.set_materialize_grads(False)
        return (y.view(x.shape), h.view(x.shape)) if ctx.added else y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        h, weight = ctx.saved_tensors
        if dy is None:
            return dh, dh, None, None, None
        rows = None if dh is None else as_rows(dh)
        dx, dweight = rms_norm_backward(
            as_rows(dy), h, weight, ctx.eps, ctx.offset, rows, weight_grad=ctx.needs_input_grad[2]
        )
        dx = dx.view(dy.shape)
        return dx, dx if ctx.added else None, dweight, None, None


@triton.jit(do_not_specialize=["rows"])  # one compilation for every number of rows
def rms_norm_forward_kernel(
    x, residual, weight, y, h, rows, n, stride_x, stride_r, stride_y, eps, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program normalizes ROWS rows, each held whole in registers; h is contiguous."""
    if LATE:  # in this order: what is launched early may read what the kernel ahead of this one writes
        gdc_wait()
    if EARLY:  # a product that waits for this may be launched
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < n)
    value = load_sum(x, residual, h, row, col, mask, n, stride_x, stride_r, ADD)
    scale = tl.rsqrt(tl.sum(value * value, 1) / n + eps)
    value = value * scale[:, None]
    if WEIGHT:
        value = value * (tl.load(weight + col, col < n, other=0.0).to(tl.float32) + offset)
    tl.store(y + row * stride_y + col, value.to(y.dtype.element_ty), mask)


@triton.jit
def rms_norm_backward_kernel(
    dy, h, weight, dh, dx, partial, rows, n, stride_dy, stride_h, stride_dh, eps, offset,
    WEIGHT: tl.constexpr, ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, EARLY: tl.constexpr,
    TOGETHER: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows, strided over the grid; dx is contiguous, partial is [programs, n] float32."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    gain = tl.full((1, BLOCK), 1.0, tl.float32)
    if WEIGHT:
        gain = tl.load(weight + col, col < n, other=0.0).to(tl.float32) + offset
    total = tl.zeros((1, BLOCK), tl.float32)
    for start in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (col < n)
        value = tl.load(h + row * stride_h + col, mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * stride_dy + col, mask, other=0.0).to(tl.float32)
        scaled = grad * gain
        squares, dot = two_sums(value * value, scaled * value, TOGETHER)
        scale = tl.rsqrt(squares / n + eps)[:, None]
        result = scale * scaled - value * (scale * scale * scale * dot[:, None] / n)
        if ADD:
            result += tl.load(dh + row * stride_dh + col, mask, other=0.0).to(tl.float32)
        tl.store(dx + row * n + col, result.to(dx.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            total += tl.sum(grad * value * scale, 0)[None, :]
    if EARLY:
        gdc_launch_dependents()
    if WEIGHT_GRAD:
        tl.store(partial + program * n + col, total, col < n)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    block, tile, warps = launch_shape(4096)
    ptr, f32, i32 = f"*{float_dtype}", "fp32", "i32"
    forward = dict.fromkeys(("x", "residual", "weight", "y", "h"), ptr)
    forward |= dict.fromkeys(("rows", "n", "stride_x", "stride_r", "stride_y"), i32) | {"eps": f32, "offset": f32}
    backward = dict.fromkeys(("dy", "h", "weight", "dh", "dx"), ptr) | {"partial": "*fp32"}
    backward |= dict.fromkeys(("rows", "n", "stride_dy", "stride_h", "stride_dh"), i32) | {"eps": f32, "offset": f32}
    shape = {"ROWS": tile, "BLOCK": block, "WEIGHT": True, "ADD": True}
    return [
        (rms_norm_forward_kernel, forward, {**shape, "LATE": False, "EARLY": False}, {"num_warps": warps}),
        (
            rms_norm_backward_kernel,
            backward,
            {**shape, "WEIGHT_GRAD": True, "EARLY": False, "TOGETHER": True, "STAGES": 3},
            {"num_warps": warps},
        ),
    ]
