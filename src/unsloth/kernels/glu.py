"""The kernel behind the gated linear units: ``h = act(gate) * up``, forward and backward.

One elementwise pass each way. The backward recomputes the activation from gate, so only gate and up are kept::

    dgate = dh * up * act'(gate)                  dup = dh * act(gate)

and it can write h again in the same pass, for a caller that needs it for a weight gradient and did not keep it.
:mod:`unsloth.kernels.swiglu` and :mod:`unsloth.kernels.geglu` hold the activations' formulas and references.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra.cuda import gdc_launch_dependents

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import (
    as_rows,
    can_launch,
    check_shape,
    check_tensors,
    launch_on,
    overlaps_launches,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def takes_kernel(op: str, gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Check the inputs of ``op``, and say whether the kernel can take them."""
    check_tensors(op, gate=gate, up=up)
    check_shape(op, "up", up, tuple(gate.shape))
    if gate.dim() == 0:
        raise ConfigError(f"{op}: gate has no dimension", got=tuple(gate.shape), do="Pass a tensor of shape [..., F].")
    return gate.dtype == up.dtype and can_launch(gate, up)


def glu_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """``act(gate) * up`` on matrices, without autograd.

    Args:
        gate: [M, F] with adjacent columns; may be half of a fused [M, 2F] projection.
        up: [M, F] likewise.
        activation: One of :data:`ACTIVATIONS`.
        out: [M, F] with adjacent columns to write into (it may be gate or up); None allocates.

    Returns:
        [M, F].
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if out.numel():
        rows, n = gate.shape
        block, warps = launch_shape(n, activation)
        with launch_on(gate):
            glu_forward_kernel[(rows * triton.cdiv(n, block),)](
                gate, up, out, n, gate.stride(0), up.stride(0), out.stride(0),
                ACTIVATION=activation, EARLY=overlaps_launches(gate.device), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up on matrices [M, F] with adjacent columns.

    Args:
        dh: Gradient of h.
        gate: As in the forward.
        up: As in the forward.
        activation: One of :data:`ACTIVATIONS`.
        dgate: Where to write the gradient of gate (it may be gate itself, or a view of a fused buffer); None allocates.
        dup: Likewise for up.
        h: Where to write ``act(gate) * up`` again (it may be dh); None to leave that out.

    Returns:
        ``(dgate, dup)``.
    """
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if dup is None else dup
    if dh.numel():
        rows, n = gate.shape
        block, warps = launch_shape(n, activation)
        with launch_on(gate):
            glu_backward_kernel[(rows * triton.cdiv(n, block),)](
                dh, gate, up, dgate, dup, h, n, dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
                dup.stride(0), 0 if h is None else h.stride(0), ACTIVATION=activation,
                RECOMPUTE=h is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return dgate, dup


def launch_shape(n: int, activation: str) -> tuple[int, int]:
    """Columns of a tile and warps: 4 elements a thread, 8 for the exact gelu, whose arithmetic is longest."""
    block, each = (1024, 8) if activation == "gelu" else (512, 4)
    block = min(block, triton.next_power_of_2(n))
    return block, max(1, block // (32 * each))


class GatedLinearUnit(torch.autograd.Function):
    """``act(gate) * up`` with its gradients; ``apply(gate, up, activation)``."""

    @staticmethod
    def forward(ctx, gate, up, activation):  # noqa: D102
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(as_rows(gate), as_rows(up), activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # noqa: D102
        gate, up = ctx.saved_tensors
        dgate, dup = glu_backward(as_rows(dh), as_rows(gate), as_rows(up), ctx.activation)
        return dgate.view(gate.shape), dup.view(up.shape), None


@triton.jit
def exp_of_negative(x):
    """``exp(-|x|)`` to about one unit in the last place: the rounding of the base-2 exponent is made good."""
    x = tl.maximum(-tl.abs(x), -104.0)  # below it is 0 in float32
    exponent = x * 1.4426950408889634
    lost = tl.fma(x, 1.4426950408889634, -exponent) + x * 1.925963033500968e-08
    return tl.exp2(exponent) * (1.0 + 0.6931471805599453 * lost)


@triton.jit
def sigmoids(x):
    """``sigmoid(x)`` and ``1 - sigmoid(x)``, each without cancellation and for any x."""
    decay = exp_of_negative(x)
    large = tl.div_rn(1.0, 1.0 + decay)
    small = decay * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)`` and ``act'(x)`` in float32."""
    if ACTIVATION == "silu":
        sigmoid, rest = sigmoids(x)
        return x * sigmoid, sigmoid * (1.0 + x * rest)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        # x/2 * (1 + tanh(z)) is x * sigmoid(2z)
        sigmoid, rest = sigmoids(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * sigmoid, sigmoid * (1.0 + x * rest * slope)


@triton.jit
def row_and_columns(n, BLOCK: tl.constexpr):
    """Row and columns of this program, in a grid that counts the tiles of one row after another."""
    program = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK)
    return (program // tiles).to(tl.int64), (program % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def glu_forward_kernel(
    gate, up, out, n, stride_gate, stride_up, stride_out, ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK columns of one row; neighbours in the grid are neighbours in memory."""
    if EARLY:  # a product that waits for this may be launched
        gdc_launch_dependents()
    row, col = row_and_columns(n, BLOCK)
    mask = col < n
    g = tl.load(gate + row * stride_gate + col, mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + col, mask, other=0.0).to(tl.float32)
    value, _ = activate(g, ACTIVATION)
    tl.store(out + row * stride_out + col, (value * u).to(out.dtype.element_ty), mask)


@triton.jit
def glu_backward_kernel(
    dh, gate, up, dgate, dup, h, n, stride_dh, stride_gate, stride_up, stride_dgate, stride_dup, stride_h,
    ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As in the forward; all loads come before the stores, so outputs may be inputs."""
    row, col = row_and_columns(n, BLOCK)
    mask = col < n
    grad = tl.load(dh + row * stride_dh + col, mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + col, mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + col, mask, other=0.0).to(tl.float32)
    value, slope = activate(g, ACTIVATION)
    tl.store(dgate + row * stride_dgate + col, (grad * u * slope).to(dgate.dtype.element_ty), mask)
    tl.store(dup + row * stride_dup + col, (grad * value).to(dup.dtype.element_ty), mask)
    if RECOMPUTE:
        tl.store(h + row * stride_h + col, (value * u).to(h.dtype.element_ty), mask)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    ptr = f"*{float_dtype}"
    forward = dict.fromkeys(("gate", "up", "out"), ptr)
    forward |= dict.fromkeys(("n", "stride_gate", "stride_up", "stride_out"), "i32")
    backward = dict.fromkeys(("dh", "gate", "up", "dgate", "dup", "h"), ptr) | {"n": "i32"}
    strides = ("stride_dh", "stride_gate", "stride_up", "stride_dgate", "stride_dup", "stride_h")
    backward |= dict.fromkeys(strides, "i32")
    examples = []
    for activation in ACTIVATIONS:
        block, warps = launch_shape(14336, activation)
        shape = {"ACTIVATION": activation, "BLOCK": block}
        examples.append((glu_forward_kernel, forward, {**shape, "EARLY": False}, {"num_warps": warps}))
        examples.append((glu_backward_kernel, backward, {**shape, "RECOMPUTE": True}, {"num_warps": warps}))
    return examples
