r"""AdamW with both moments in 8 bits, over all tensors in one launch.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, with the block-wise 8-bit moments of Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", 2022. In step t, with gradient g and learning rate r::

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    p = (1 - r * decay) p - r / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

m and v are kept as one byte a value: an index into a table of 256 numbers between -1 and 1 (0 and 1 for v), times the
largest absolute value of the block of 256 values that it is in. They are rounded to the nearest number of the table.
Arithmetic is float32. The layout is that of bitsandbytes, so that the states of the two can be exchanged.

A library call a tensor costs more than the arithmetic of an adapter: the kernel reads the addresses of all tensors
from a table instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import FLOAT_DTYPES, can_launch, launch_on

BLOCK = 256
"""Values that share one scale."""

_ROWS = 8  # blocks of one program
_SHIFT = 16  # a share's key is its exponent and the first seven bits of its mantissa
_SMALLEST = 103 << 23  # bits of 2^-24: all smaller shares have the first key
KEYS = ((127 << 23) - _SMALLEST >> _SHIFT) + 1
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class AdamWStep:
    """What one step does besides the tensors: learning rate, betas, eps, weight decay, and t, counted from 1."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def scalars(self) -> tuple[float, ...]:
        """The factors of the formula: b1, 1 - b1, b2, 1 - b2, r / (1 - b1^t), 1 / sqrt(1 - b2^t), eps, 1 - r * decay.

        Each is rounded to float32 once: 1 - b2 of a rounded b2 = 0.999 would be off by 1.3e-5 of itself.
        """
        return (
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.learning_rate / (1 - self.beta1**self.step),
            (1 - self.beta2**self.step) ** -0.5,
            self.eps,
            1 - self.learning_rate * self.weight_decay,
        )


class Moments(NamedTuple):
    """The 8-bit state of one parameter of N values.

    Attributes:
        first: uint8, the parameter's shape: m.
        second: uint8, the parameter's shape: v.
        first_scale: float32 [ceil(N / 256)].
        second_scale: float32 [ceil(N / 256)].
    """

    first: torch.Tensor
    second: torch.Tensor
    first_scale: torch.Tensor
    second_scale: torch.Tensor


class Launch:
    """What stays the same from step to step: which program does what, and where parameters and moments are.

    Attributes:
        tensor: int32 [programs], the tensor that a program works on.
        first_block: int32 [programs], its first block of that tensor.
        sizes: int64 [tensors], values of each tensor.
        mids: float32 [2, 256], what lies halfway between neighbours of the tables, then infinity.
        starts: uint8 [2, 2 * KEYS], for the key of every positive, then of every negative share: how many mids are
            below all shares that have it.
        steps: Most mids that lie between two keys.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], codes: torch.Tensor) -> None:
        device = parameters[0].device
        counts = [triton.cdiv(parameter.numel(), BLOCK * _ROWS) for parameter in parameters]
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        starts = torch.cat([torch.arange(count) for count in counts]) * _ROWS
        self.tensor, self.first_block = owners.to(device, torch.int32), starts.to(device, torch.int32)
        self.sizes = torch.tensor([parameter.numel() for parameter in parameters]).to(device)
        mids = (codes[:, 1:] + codes[:, :-1]) / 2
        self.mids = torch.nn.functional.pad(mids, (0, 1), value=float("inf"))
        self.starts, self.steps = _starts(mids.cpu())
        self.starts = self.starts.to(device)
        self._addresses: list[int] = []
        self._table = self.sizes

    def table(self, parameters: Sequence[torch.Tensor], moments: Sequence[Moments]) -> torch.Tensor:
        """int64 [tensors, 5] on the device: addresses of parameters and moments, copied only when one has changed."""
        addresses = [
            t.data_ptr()
            for p, s in zip(parameters, moments, strict=True)
            for t in (p, s.first, s.second, s.first_scale, s.second_scale)
        ]
        if addresses != self._addresses:
            self._addresses, self._table = addresses, torch.tensor(addresses).to(self.sizes.device)
        return self._table


def adamw_8bit(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    moments: Sequence[Moments],
    codes: torch.Tensor,
    step: AdamWStep,
    *,
    launch: Launch | None = None,
    fast: bool = True,
) -> None:
    """One step for all ``parameters``, in place.

    Args:
        parameters: Contiguous tensors of one floating-point dtype on one device.
        gradients: Contiguous tensors of one dtype and the parameters' shapes.
        moments: The states, changed in place.
        codes: float32 [2, 256], ascending: the tables of m and of v.
        step: Hyperparameters of this step.
        launch: Made for these tensors and tables, kept from step to step; None makes it.
        fast: False takes the plain-torch reference.

    Raises:
        ConfigError: Tensors that are not contiguous, or of differing shapes, dtypes or devices.
    """
    if not parameters:
        return
    _check(parameters, gradients)
    places = [gradient.data_ptr() for gradient in gradients]
    aligned = not any(place % 16 for place in places) and not any(p.data_ptr() % 16 for p in parameters)
    if not (fast and aligned and can_launch(parameters[0], gradients[0])):
        for parameter, gradient, state in zip(parameters, gradients, moments, strict=True):
            adamw_8bit_reference(parameter, gradient, state, codes, step)
        return
    launch = launch or Launch(parameters, codes)
    with launch_on(parameters[0]):
        adamw_8bit_kernel[(len(launch.tensor),)](
            launch.table(parameters, moments), torch.tensor(places).to(parameters[0].device), launch.tensor,
            launch.first_block, launch.sizes, codes, launch.mids, launch.starts, *step.scalars,
            P=_TRITON_DTYPES[parameters[0].dtype], G=_TRITON_DTYPES[gradients[0].dtype], STEPS=launch.steps, KEYS=KEYS,
            ROWS=_ROWS, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    # torch did not see the writes, and copies of the parameters elsewhere are renewed by their version
    torch.autograd.graph.increment_version(parameters)


def adamw_8bit_reference(
    parameter: torch.Tensor, gradient: torch.Tensor, state: Moments, codes: torch.Tensor, step: AdamWStep
) -> None:
    """The formula in plain torch, for one parameter, in place."""
    m = dequantize(state.first, state.first_scale, codes[0]).view(parameter.shape)
    v = dequantize(state.second, state.second_scale, codes[1]).view(parameter.shape)
    adamw_reference(parameter, gradient, m, v, step)
    quantize(m.flatten(), state.first, state.first_scale, codes[0])
    quantize(v.flatten(), state.second, state.second_scale, codes[1])


def adamw_reference(
    parameter: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: AdamWStep
) -> None:
    """AdamW in plain torch, for one parameter with float32 moments of its shape; all three change in place."""
    beta1, rest1, beta2, rest2, rate, correction, eps, keep = step.scalars
    g = gradient.float()
    m.mul_(beta1).add_(rest1 * g)
    v.mul_(beta2).add_(rest2 * g * g)
    parameter.copy_(keep * parameter.float() - rate * (m / (v.sqrt() * correction + eps)))


def dequantize(index: torch.Tensor, scale: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The float32 values [N] of an 8-bit state."""
    return code[index.flatten().long()] * scale.repeat_interleave(BLOCK)[: index.numel()]


def quantize(values: torch.Tensor, index: torch.Tensor, scale: torch.Tensor, code: torch.Tensor) -> None:
    """Write ``values`` [N] into an 8-bit state, each as the nearest number of the table."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = padded.abs().amax(1)
    shares = torch.where(largest[:, None] > 0, padded / largest[:, None], 0.0).flatten()[: len(values)]
    index.copy_(torch.bucketize(shares, (code[1:] + code[:-1]) / 2).view(index.shape))
    scale.copy_(largest)


def _starts(mids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``Launch.starts`` and ``Launch.steps`` of mids [2, 255] on the CPU."""
    edges = (torch.arange(KEYS, dtype=torch.int32) * 2**_SHIFT + _SMALLEST).view(torch.float32)
    low = torch.cat([torch.zeros(1), edges[1:]])
    high = torch.cat([edges[1:], torch.ones(1)])
    starts, steps = [], 1
    for row in mids:
        for first, last in ((low, high), (-high, -low)):
            start = torch.bucketize(first, row, right=first is not low)
            steps = max(steps, int((torch.bucketize(last, row) - start).max()))
            starts.append(start)
    return torch.stack(starts).view(2, -1).to(torch.uint8), steps


def _check(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    first = parameters[0]
    dtype, grad_dtype, device = first.dtype, gradients[0].dtype, first.device
    for parameter, gradient in zip(parameters, gradients, strict=True):
        same = parameter.dtype is dtype and gradient.dtype is grad_dtype
        same = same and parameter.device == device and gradient.device == device
        if not same or parameter.shape != gradient.shape or dtype not in FLOAT_DTYPES:
            raise ConfigError(
                "adamw_8bit: parameters and gradients need one floating-point dtype each, one device and equal shapes",
                got=f"{parameter.dtype} {tuple(parameter.shape)} and {gradient.dtype} {tuple(gradient.shape)}",
            )
        if not (parameter.is_contiguous() and gradient.is_contiguous()):
            raise ConfigError("adamw_8bit: a tensor is not contiguous", got=tuple(parameter.shape))


@triton.jit
def nearest(share, mids, starts, STEPS: tl.constexpr, KEYS: tl.constexpr):
    """Index of the table's number that is nearest to each ``share``: how many of the 255 ``mids`` are below it.

    The first bits of a float tell that but for the STEPS mids that may share them.
    """
    bits = tl.abs(share).to(tl.int32, bitcast=True)
    key = (tl.minimum(tl.maximum(bits, 0x33800000), 0x3F800000) - 0x33800000) >> 16  # NaN stays inside the table
    index = tl.load(starts + key + tl.where(share < 0.0, KEYS, 0)).to(tl.int32)
    for _ in tl.static_range(STEPS):
        index += (share > tl.load(mids + index)).to(tl.int32)
    return index


@triton.jit
def store_moment(
    value, index_pointer, scale_pointer, mids, starts, at, mask, block, blocks, STEPS: tl.constexpr, KEYS: tl.constexpr
):
    """Quantize a tile [ROWS, BLOCK], one block to a row, and store it with its scales."""
    largest = tl.max(tl.abs(value), 1)
    divisor = tl.where(largest > 0, largest, 1.0)
    index = nearest(tl.div_rn(value, divisor[:, None]), mids, starts, STEPS, KEYS)
    tl.store(index_pointer + at, index.to(tl.uint8), mask)
    tl.store(scale_pointer + block, largest, block < blocks)


@triton.jit
def adamw_8bit_kernel(
    addresses, gradients, tensor, first_block, sizes, codes, mids, starts, beta1, rest1, beta2, rest2, rate,
    correction, eps, keep, P: tl.constexpr, G: tl.constexpr, STEPS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates ROWS blocks of one tensor."""
    program = tl.program_id(0)
    which = tl.load(tensor + program).to(tl.int64)
    size = tl.load(sizes + which)
    row = addresses + which * 5
    parameter = tl.multiple_of(tl.load(row).to(tl.pointer_type(P)), 16)
    gradient = tl.multiple_of(tl.load(gradients + which).to(tl.pointer_type(G)), 16)
    first = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.uint8)), 16)
    second = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.uint8)), 16)
    first_scale = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    second_scale = tl.load(row + 4).to(tl.pointer_type(tl.float32))

    blocks = tl.cdiv(size, BLOCK)
    block = tl.load(first_block + program).to(tl.int64) + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < size
    g = tl.load(gradient + at, mask, other=0.0).to(tl.float32)
    m_old = tl.load(codes + tl.load(first + at, mask, other=0).to(tl.int32), mask, other=0.0)
    v_old = tl.load(codes + 256 + tl.load(second + at, mask, other=0).to(tl.int32), mask, other=0.0)
    m = beta1 * (m_old * tl.load(first_scale + block, block < blocks, other=0.0)[:, None]) + rest1 * g
    v = beta2 * (v_old * tl.load(second_scale + block, block < blocks, other=0.0)[:, None]) + rest2 * g * g
    p = tl.load(parameter + at, mask, other=0.0).to(tl.float32)
    p = keep * p - rate * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
    tl.store(parameter + at, p.to(P), mask)
    store_moment(m, first, first_scale, mids, starts, at, mask, block, blocks, STEPS, KEYS)
    store_moment(v, second, second_scale, mids + 256, starts + 2 * KEYS, at, mask, block, blocks, STEPS, KEYS)


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"addresses": "*i64", "gradients": "*i64", "tensor": "*i32", "first_block": "*i32", "sizes": "*i64"}
    signature |= dict.fromkeys(("codes", "mids"), "*fp32") | {"starts": "*u8"}
    signature |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "rate", "correction", "eps", "keep"), "fp32")
    shape = {"STEPS": 1, "KEYS": KEYS, "ROWS": _ROWS, "BLOCK": BLOCK}
    dtype = {"fp16": tl.float16, "bf16": tl.bfloat16}.get(float_dtype, tl.float32)
    return [
        (adamw_8bit_kernel, signature, {"P": kind, "G": kind, **shape}, {"num_warps": 8})
        for kind in (tl.float32, dtype)
    ]
