"""Layer normalization of the last dimension, with an optional residual addition in the same pass.

    h = x + residual                              (add_layer_norm; otherwise h = x)
    y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias

var is the biased variance. All arithmetic is float32, rounded once to x's dtype, and
without fused multiply-add, so that equal terms cancel exactly. With z = (h - mean) * r, where r is the reciprocal
standard deviation, and g = dy * weight::

    dh = r * (g - mean(g) - z * mean(g * z))      dweight = sum over rows of dy * z      dbias = sum over rows of dy

Kept for the backward are h and, for each row, mean and r in float32; without the latter it computes them again. Ba,
Kiros and Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra.cuda import gdc_launch_dependents

from unsloth.kernels.column_sum import column_sum
from unsloth.kernels.dispatch import (
    adjacent,
    as_rows,
    compute_dtype,
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


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """Normalize the last dimension of ``x`` to zero mean and unit variance.

    Args:
        x: Floating-point tensor of shape [..., N].
        weight: Shape [N], any floating dtype; None for no weight.
        bias: Shape [N], any floating dtype; None for no bias.
        eps: Added to the variance.
        fast: False takes the plain-torch reference.

    Returns:
        Tensor of x's shape and dtype.
    """
    if not (takes_kernel("layer_norm", x, weight=weight, bias=bias) and fast):
        return layer_norm_reference(x, weight, bias, eps)
    return _LayerNorm.apply(x, None, adjacent(weight), adjacent(bias), eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`layer_norm` of ``h = x + residual`` in one pass over memory; residual is like x. Returns ``(y, h)``."""
    if not (takes_kernel("layer_norm", x, residual, weight=weight, bias=bias) and fast):
        h = x + residual
        return layer_norm_reference(h, weight, bias, eps), h
    return _LayerNorm.apply(x, residual, adjacent(weight), adjacent(bias), eps)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The formula in plain torch, computed in float32 (float64 for float64 inputs)."""
    wide = x.to(compute_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel on matrices [M, N] with adjacent columns, without autograd.

    ``out`` may be columns of a wider buffer; None allocates. Into ``stats`` (float32 [M, 2]) go mean and reciprocal
    standard deviation of each row. Returns ``(y, h)``, h being x where there is no residual.
    """
    rows, n = x.shape
    y, h = result_buffers(x, residual, out)
    if y.numel() == 0:
        return y, h
    block, tile, warps = launch_shape(n)
    with launch_on(x):
        layer_norm_forward_kernel[(triton.cdiv(rows, tile),)](
            x, residual, weight, bias, y, h, stats, rows, n, x.stride(0), row_stride(residual), y.stride(0), eps,
            ADD=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, STATS=stats is not None,
            ROWS=tile, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y, h


def layer_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    dh: torch.Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernel on matrices [M, N] with adjacent columns.

    Args:
        dy: Gradient of y.
        h: What was normalized.
        weight: [N] or None.
        eps: Added to the variance.
        dh: Gradient that reaches h by other ways (the residual stream), or None.
        grad_dtype: Dtype of the gradients of weight and bias; None leaves them out.
        stats: As the forward wrote them; None computes them again.

    Returns:
        ``(dx, dweight, dbias)``, the last two of shape [N], or None.
    """
    rows, n = h.shape
    dx = torch.empty((rows, n), dtype=h.dtype, device=h.device)
    if dx.numel() == 0:
        zeros = None if grad_dtype is None else torch.zeros(n, dtype=grad_dtype, device=h.device)
        return dx, zeros, zeros
    block, tile, warps = launch_shape(n)
    stages, partial = 1, None
    if grad_dtype is None:
        warps, programs = max(1, warps // 2), triton.cdiv(rows, tile)
    else:
        per_processor, tile, warps, stages = looped_shape(n, tile, warps, stats is not None)
        programs = equal_shares(triton.cdiv(rows, tile), per_processor * processor_count(h.device))
        partial = torch.empty((programs, 2 * n), dtype=torch.float32, device=h.device)
    with launch_on(h):
        layer_norm_backward_kernel[(programs,)](
            dy, h, weight, stats, dh, dx, partial, rows, n, dy.stride(0), h.stride(0), row_stride(dh), eps,
            WEIGHT=weight is not None, STATS=stats is not None, ADD=dh is not None,
            PARAMETER_GRADS=partial is not None, EVEN=n == block and rows % tile == 0,
            EARLY=partial is not None and overlaps_launches(h.device), TOGETHER=not interpreting(), STAGES=stages,
            ROWS=tile, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return dx, *((None, None) if partial is None else column_sum(partial, grad_dtype).split(n))


def looped_shape(n: int, tile: int, warps: int, stats: bool) -> tuple[int, int, int, int]:
    """Where programs loop to sum weight gradients: programs a multiprocessor, rows a tile, warps, stages of loads."""
    if stats and 2048 < n <= 4096:
        return 1, 2, warps, 3
    return (1, tile, warps, 5) if n <= 4096 else (2, tile, warps, 3 if n <= 8192 else 1)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        rows, stats = as_rows(x), None
        if any(ctx.needs_input_grad):
            stats = torch.empty(rows.shape[0], 2, dtype=torch.float32, device=x.device)
        residual_rows = None if residual is None else as_rows(residual)
        y, h = layer_norm_forward(rows, weight, bias, eps, residual_rows, stats=stats)
        ctx.save_for_backward(h, weight, bias, stats)
        ctx.eps, ctx.added = eps, residual is not None
        ctx.set_materialize_grads(False)
        return (y.view(x.shape), h.view(x.shape)) if ctx.added else y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        h, weight, bias, stats = ctx.saved_tensors
        if dy is None:
            return dh, dh, None, None, None
        wanted = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        rows = None if dh is None else as_rows(dh)
        dtypes = {x.dtype for x, grad in zip((weight, bias), wanted, strict=True) if grad}
        dtype = None if not dtypes else torch.float32 if len(dtypes) > 1 else dtypes.pop()
        dx, dweight, dbias = layer_norm_backward(as_rows(dy), h, weight, ctx.eps, rows, dtype, stats)
        dx = dx.view(dy.shape)
        grads = [g.to(p.dtype) if w and g is not None else None
                 for g, p, w in zip((dweight, dbias), (weight, bias), wanted, strict=True)]  # fmt: skip
        return dx, dx if ctx.added else None, *grads, None


@triton.jit
def layer_norm_forward_kernel(
    x, residual, weight, bias, y, h, stats, rows, n, stride_x, stride_r, stride_y, eps,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program normalizes ROWS rows, each held whole in registers; h is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < n)
    value = load_sum(x, residual, h, row, col, mask, n, stride_x, stride_r, ADD)
    if WEIGHT:  # fetched before the sums, which wait for the whole row
        gain = tl.load(weight + col, col < n, other=0.0)
    if BIAS:
        added = tl.load(bias + col, col < n, other=0.0)
    mean = (tl.sum(value, 1) / n)[:, None]
    value = tl.where(mask, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / n + eps)[:, None]
    value = value * scale
    if STATS:
        tl.store(stats + row * 2, mean, row < rows)
        tl.store(stats + row * 2 + 1, scale, row < rows)
    if WEIGHT:
        value = value * gain.to(tl.float32)
    if BIAS:
        value = value + added.to(tl.float32)
    tl.store(y + row * stride_y + col, value.to(y.dtype.element_ty), mask)


@triton.jit
def layer_norm_backward_kernel(
    dy, h, weight, stats, dh, dx, partial, rows, n, stride_dy, stride_h, stride_dh, eps,
    WEIGHT: tl.constexpr, STATS: tl.constexpr, ADD: tl.constexpr, PARAMETER_GRADS: tl.constexpr,
    EVEN: tl.constexpr, EARLY: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows, strided over the grid; dx is contiguous, partial is [programs, 2 * n] float32."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK)[None, :]
    gain = tl.full((1, BLOCK), 1.0, tl.float32)
    if WEIGHT:
        gain = tl.load(weight + col, col < n, other=0.0).to(tl.float32)
    total_weight = tl.zeros((1, BLOCK), tl.float32)
    total_bias = tl.zeros((1, BLOCK), tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (col < n)
        if EVEN:
            mask = tl.full((ROWS, BLOCK), True, tl.int1)  # the compiler leaves it out
        value = tl.load(h + row * stride_h + col, mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * stride_dy + col, mask, other=0.0).to(tl.float32)
        scaled = grad * gain
        if STATS:
            mean = tl.load(stats + row * 2, row < rows, other=0.0)
            scale = tl.load(stats + row * 2 + 1, row < rows, other=0.0)
            value = tl.where(mask, value - mean, 0.0) * scale
            scaled_sum, dot = two_sums(scaled, scaled * value, TOGETHER)
        else:
            first, scaled_sum = two_sums(value, scaled, TOGETHER)
            value = tl.where(mask, value - (first / n)[:, None], 0.0)
            squares, dot = two_sums(value * value, scaled * value, TOGETHER)
            scale = tl.rsqrt(squares / n + eps)[:, None]
            value, dot = value * scale, dot * tl.rsqrt(squares / n + eps)
        result = scale * (scaled - (scaled_sum / n)[:, None] - value * (dot / n)[:, None])
        if ADD:
            result += tl.load(dh + row * stride_dh + col, mask, other=0.0).to(tl.float32)
        tl.store(dx + row * n + col, result.to(dx.dtype.element_ty), mask)
        if PARAMETER_GRADS:
            total_weight += tl.sum(grad * value, 0)[None, :]
            total_bias += tl.sum(grad, 0)[None, :]
    if EARLY:
        gdc_launch_dependents()
    if PARAMETER_GRADS:
        tl.store(partial + program * 2 * n + col, total_weight, col < n)
        tl.store(partial + (program * 2 + 1) * n + col, total_bias, col < n)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    block, tile, warps = launch_shape(4096)
    ptr, i32 = f"*{float_dtype}", "i32"
    forward = dict.fromkeys(("x", "residual", "weight", "bias", "y", "h"), ptr) | {"eps": "fp32"}
    forward |= dict.fromkeys(("rows", "n", "stride_x", "stride_r", "stride_y"), i32)
    backward = dict.fromkeys(("dy", "h", "weight", "dh", "dx"), ptr) | {
        "partial": "*fp32",
        "stats": "*fp32",
        "eps": "fp32",
    }
    backward |= dict.fromkeys(("rows", "n", "stride_dy", "stride_h", "stride_dh"), i32)
    forward["stats"] = backward["stats"] = backward["partial"] = "*fp32"
    shape = {"ROWS": tile, "BLOCK": block, "WEIGHT": True, "ADD": True}
    common = {**shape, "PARAMETER_GRADS": True, "EARLY": False, "TOGETHER": True}
    again = {"STAGES": 5, "STATS": False, "EVEN": False}
    kept = {"STAGES": 3, "STATS": True, "EVEN": True, "ROWS": 2}
    return [
        (layer_norm_forward_kernel, forward, {**shape, "BIAS": True, "STATS": True}, {"num_warps": warps}),
        (layer_norm_backward_kernel, backward, {**common, **again}, {"num_warps": warps}),
        (layer_norm_backward_kernel, backward, {**common, **kept}, {"num_warps": warps}),
    ]
