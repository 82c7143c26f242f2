r"""AdamW with both moments in 8 bits, over all tensors in one launch.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, with the block-wise 8-bit moments of Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", 2022. In step t, with gradient g and learning rate r::

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    p = (1 - r * decay) p - r / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

m and v are kept as one byte a value: an index into a table of 256 numbers between -1 and 1 (0 and 1 for v), times the
largest absolute value of the block of 256 values that it is in. They are rounded to the nearest number of the table.
Arithmetic is float32; the kernel takes root and quotient as the hardware gives them, within 2^-21. The layout is that
of bitsandbytes, so that the states of the two can be exchanged. (Its GPU code decays a parameter after the step, not
before.)

A library call a tensor costs more than the arithmetic of an adapter: the kernel reads the addresses of all tensors
from a table instead. Bytes: parameter and both moments twice, gradient once: 16 a value of float32 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.approximate import reciprocal
from unsloth.kernels.dispatch import FLOAT_DTYPES, can_launch, interpreting, launch_on, processor_count
from unsloth.kernels.nf4 import assembly

BLOCK = 256
"""Values that share one scale."""

_ROWS, _WARPS = 8, 8  # blocks of one tile: each is a warp's
_PROGRAMS, _REGISTERS = 3, 80  # programs of one multiprocessor, and what each of their threads may take
SMALLEST = tl.constexpr(103 << 23)  # bits of 2^-24: all smaller shares have the first key
SHIFT_M, SHIFT_V = tl.constexpr(17), tl.constexpr(16)  # a key is an exponent and six, of v seven, bits of a mantissa
MASK_M, MASK_V = (tl.constexpr((1 << shift.value) - 1) for shift in (SHIFT_M, SHIFT_V))
KEYS_M, KEYS_V = (tl.constexpr(((127 << 23) - SMALLEST.value >> shift.value) + 1) for shift in (SHIFT_M, SHIFT_V))
TABLES = -(-(512 + 2 * KEYS_M.value + KEYS_V.value) // 256) * 256
"""Entries of :func:`make_tables`."""

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
SHARED = tl.constexpr(f".shared .align 16 .b8 adamw_tables[{4 * TABLES}];\nmov.u32 $0, adamw_tables;")
THREAD = assembly("mov.u32 $0, %tid.x;")
STORE = assembly("st.shared.b32 [$1], $2;", "mov.b32 $0, 0;")
LOAD = assembly("ld.shared.b32 $0, [$1];")
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
        tables: int32 [TABLES], see :func:`make_tables`.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], codes: torch.Tensor) -> None:
        device = parameters[0].device
        counts = [triton.cdiv(parameter.numel(), BLOCK * _ROWS) for parameter in parameters]
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        starts = torch.cat([torch.arange(count) for count in counts]) * _ROWS
        self.tensor, self.first_block = owners.to(device, torch.int32), starts.to(device, torch.int32)
        self.sizes = torch.tensor([parameter.numel() for parameter in parameters]).to(device)
        self.tables = make_tables(codes)
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
        tiles, device = len(launch.tensor), parameters[0].device
        adamw_8bit_kernel[(min(tiles, _PROGRAMS * processor_count(device)),)](
            launch.table(parameters, moments), torch.tensor(places).to(device), launch.tensor, launch.first_block,
            launch.sizes, launch.tables, *step.scalars, tiles, P=_TRITON_DTYPES[parameters[0].dtype],
            G=_TRITON_DTYPES[gradients[0].dtype], SIZE=TABLES, PLAIN=interpreting(), ROWS=_ROWS, BLOCK=BLOCK,
            WARPS=_WARPS, num_warps=_WARPS, maxnreg=_REGISTERS,
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
    shares = (padded * (1 / largest.clamp(min=2.0**-126))[:, None]).flatten()[: len(values)]
    index.copy_(torch.bucketize(shares, (code[1:] + code[:-1]) / 2).view(index.shape))
    scale.copy_(largest)


def make_tables(codes: torch.Tensor) -> torch.Tensor:
    """What the kernel looks up, int32 [TABLES]: 256 float32 numbers of m, 256 of v, then an entry for each key.

    A key is the first bits of a share of the largest value: its exponent and six (of v seven) bits of its mantissa, so
    that at most one of the 255 points halfway between neighbours of the table ("mids") lies among the shares that have
    it. The index is how many mids are below the share: those below all shares of its key, and one more if the remaining
    bits are above those of the mid among them. With both in one entry, one sum tells: (start << rest) + the largest
    rest - the mid's rest, to which the share's rest is added, carries into the start. Shares below zero have keys of
    their own, and all bits of their rest inverted, for they ascend the other way.

    Raises:
        ConfigError: Tables with more than one mid to a key.
    """
    mids = ((codes[:, 1:] + codes[:, :-1]) / 2).cpu()
    parts = [codes[0].cpu().view(torch.int32), codes[1].cpu().view(torch.int32)]
    signed = (0, SHIFT_M.value, KEYS_M.value)
    for row, shift, keys, below in ((*signed, False), (*signed, True), (1, SHIFT_V.value, KEYS_V.value, False)):
        own = mids[row][(mids[row] < 0) == below]
        bits = own.abs().view(torch.int32)
        key = (bits - SMALLEST.value) >> shift
        if key.min() < 0 or key.max() >= keys or len(key.unique()) != len(key):
            raise ConfigError("adamw_8bit: the tables are finer than the kernel can tell", do="Pass fast=False.")
        largest = (1 << shift) - 1
        rest = (bits & largest) ^ (largest if below else 0)
        counts = torch.zeros(keys, dtype=torch.int64).index_fill_(0, key.long(), 1)
        before = counts.cumsum(0) - counts  # mids of smaller shares, by size
        start = len(own) - before - counts if below else int((mids[row] < 0).sum()) + before
        entries = start << shift
        parts.append(entries.index_add_(0, key.long(), (largest - rest).long()).to(torch.int32))
    return torch.nn.functional.pad(torch.cat(parts), (0, TABLES - sum(map(len, parts)))).to(codes.device)


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
def fill_tables(tables, SIZE: tl.constexpr, THREADS: tl.constexpr, PLAIN: tl.constexpr):
    """Copy the tables into shared memory, whose address it returns; PLAIN leaves them where they are."""
    if PLAIN:
        return tables
    else:
        shared = tl.inline_asm_elementwise(SHARED, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
        thread = tl.inline_asm_elementwise(THREAD, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
        for start in tl.static_range(0, SIZE, THREADS):
            entry = tl.load(tables + start + thread)
            operands = [shared + (start + thread) * 4, entry]
            tl.inline_asm_elementwise(STORE, "=r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        return shared


@triton.jit
def look_up(tables, at, PLAIN: tl.constexpr):
    """Entries ``at`` of the tables."""
    if PLAIN:
        return tl.load(tables + at)
    else:
        return tl.inline_asm_elementwise(LOAD, "=r,r", [tables + at * 4], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def nearest(share, tables, SIGNED: tl.constexpr, PLAIN: tl.constexpr):
    """Index of the number that is nearest to each ``share`` (see :func:`make_tables`); NaN gives some index."""
    FIRST: tl.constexpr = 512 if SIGNED else 512 + 2 * KEYS_M
    SHIFT: tl.constexpr = SHIFT_M if SIGNED else SHIFT_V
    MASK: tl.constexpr = MASK_M if SIGNED else MASK_V
    size = tl.minimum(tl.maximum(tl.abs(share), 5.960464477539063e-08), 1.0).to(tl.int32, bitcast=True)  # 2^-24 to 1
    at = FIRST - (SMALLEST >> SHIFT) + (size >> SHIFT)
    if SIGNED:
        below = share.to(tl.int32, bitcast=True) >> 31  # all bits where the sign is set
        return (look_up(tables, at + (below & KEYS_M), PLAIN) + ((size ^ below) & MASK)) >> SHIFT
    else:
        return (look_up(tables, at, PLAIN) + (size & MASK)) >> SHIFT


@triton.jit
def largest_of_blocks(value):
    """The largest absolute values [ROWS] of a tile [2, ROWS, BLOCK / 2], one block to a row."""
    return tl.max(tl.max(tl.abs(value), 2), 0)


@triton.jit
def inverse(scale):
    """1 / scale, as a factor of a tile."""
    return tl.div_rn(1.0, tl.maximum(scale, SMALLEST_NORMAL))[None, :, None]


@triton.jit
def update_tile(
    parameter, gradient, first, second, first_scale, second_scale, block, size, tables, beta1, rest1, beta2, rest2,
    rate, correction, eps, keep, FULL: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update these blocks of a tensor of ``size`` values; FULL where all of them are whole.

    A thread has four neighbours of each half of a block, which is what one load takes of float32, so that little moves
    between threads but the blocks' largest values.
    """
    inside = tl.arange(0, 2)[:, None, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
    at = tl.max_contiguous(block[None, :, None] * BLOCK + inside, (1, 1, 4))
    if FULL:  # masks would split the loads into those of single values
        mask, other, known = None, None, None
    else:
        mask, other, known = at < size, 0, block * BLOCK < size
    g = tl.load(gradient + at, mask, other).to(tl.float32)
    p = tl.load(parameter + at, mask, other).to(tl.float32)
    m_index = tl.load(first + at, mask, other).to(tl.int32)
    v_index = tl.load(second + at, mask, other).to(tl.int32)
    m_scale = tl.load(first_scale + block, known, other)[None, :, None]
    v_scale = tl.load(second_scale + block, known, other)[None, :, None]
    m = look_up(tables, m_index, PLAIN).to(tl.float32, bitcast=True) * m_scale
    v = look_up(tables, 256 + v_index, PLAIN).to(tl.float32, bitcast=True) * v_scale
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    if not FULL:
        m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
    p = keep * p - rate * (m * reciprocal(tl.sqrt(v) * correction + eps, PLAIN))
    tl.store(parameter + at, p.to(parameter.dtype.element_ty), mask)

    m_scale, v_scale = largest_of_blocks(m), largest_of_blocks(v)
    tl.store(first + at, nearest(m * inverse(m_scale), tables, True, PLAIN).to(tl.uint8), mask)
    tl.store(second + at, nearest(v * inverse(v_scale), tables, False, PLAIN).to(tl.uint8), mask)
    tl.store(first_scale + block, m_scale, known)
    tl.store(second_scale + block, v_scale, known)


@triton.jit
def adamw_8bit_kernel(
    addresses, gradients, tensor, first_block, sizes, tables, beta1, rest1, beta2, rest2, rate, correction, eps, keep,
    tiles, P: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, PLAIN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program updates tile after tile of ROWS blocks of one tensor."""
    tables = fill_tables(tables, SIZE, 32 * WARPS, PLAIN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        which = tl.load(tensor + tile).to(tl.int64)
        size = tl.load(sizes + which)
        row = addresses + which * 5
        parameter = tl.multiple_of(tl.load(row).to(tl.pointer_type(P)), 16)
        gradient = tl.multiple_of(tl.load(gradients + which).to(tl.pointer_type(G)), 16)
        first = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.uint8)), 16)
        second = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.uint8)), 16)
        first_scale = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        second_scale = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        start = tl.load(first_block + tile).to(tl.int64)
        block = start + tl.arange(0, ROWS)
        if (start + ROWS) * BLOCK <= size:
            update_tile(
                parameter, gradient, first, second, first_scale, second_scale, block, size, tables, beta1, rest1, beta2,
                rest2, rate, correction, eps, keep, True, PLAIN, BLOCK,
            )  # fmt: skip
        else:
            update_tile(
                parameter, gradient, first, second, first_scale, second_scale, block, size, tables, beta1, rest1, beta2,
                rest2, rate, correction, eps, keep, False, PLAIN, BLOCK,
            )  # fmt: skip


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"addresses": "*i64", "gradients": "*i64", "tensor": "*i32", "first_block": "*i32", "sizes": "*i64"}
    signature |= {"tables": "*i32", "tiles": "i32"}
    scalars = ("beta1", "rest1", "beta2", "rest2", "rate", "correction", "eps", "keep")
    signature |= dict.fromkeys(scalars, "fp32")
    shape = {"SIZE": TABLES, "PLAIN": False, "ROWS": _ROWS, "BLOCK": BLOCK, "WARPS": _WARPS}
    dtype = {"fp16": tl.float16, "bf16": tl.bfloat16}.get(float_dtype, tl.float32)
    return [
        (adamw_8bit_kernel, signature, {"P": kind, "G": kind, **shape}, {"num_warps": _WARPS, "maxnreg": _REGISTERS})
        for kind in (tl.float32, dtype)
    ]
