"""Dequantization of MXFP4 weights, the format of the gpt-oss experts.

Values are E2M1: a sign, two bits of exponent, one of mantissa, so 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
Blocks of 32 values along K share an E8M0 scale, a power of two; two values lie in a byte, the first in the low nibble::

    w[k] = e2m1(nibble[k]) * 2^(scale[k // 32] - 127)

A scale of 255 means NaN. Products are exact in float32, then rounded once. Open Compute Project, "OCP Microscaling
Formats (MX) Specification", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import can_launch, launch_on
from unsloth.kernels.nf4 import check_output, interleave_eight

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_mxfp4(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fast: bool = True,
) -> torch.Tensor:
    """Dequantize an MXFP4 tensor.

    Args:
        blocks: uint8 [..., G, 16], 32 values to a block.
        scales: uint8 [..., G].
        out: Matrix [rows, G * 32] with adjacent columns to write into, where rows is the product of the leading
            dimensions; None allocates.
        dtype: Output dtype where ``out`` is None.
        fast: False takes the plain-torch reference.

    Returns:
        ``out`` if given, else a tensor [..., G * 32].
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, 16):
        got = (blocks.dtype, tuple(blocks.shape), scales.dtype, tuple(scales.shape))
        do = "Pass uint8 blocks [..., G, 16] and uint8 scales [..., G]."
        raise ConfigError("dequantize_mxfp4: blocks and scales do not fit", got=got, do=do)
    if scales.dim() == 0 or blocks.device != scales.device:
        devices = (str(blocks.device), str(scales.device))
        raise ConfigError("dequantize_mxfp4: blocks and scales do not fit", got=devices, do="Pass both on one device.")
    lead, columns = scales.shape[:-1], scales.shape[-1] * 32
    rows = lead.numel()
    result = torch.empty((rows, columns), dtype=dtype, device=blocks.device) if out is None else out
    check_output("dequantize_mxfp4", result, (rows, columns), blocks.device)
    usable = blocks.is_contiguous() and blocks.data_ptr() % 16 == 0
    if not (fast and usable and can_launch(result)):
        result.copy_(dequantize_mxfp4_reference(blocks, scales, result.dtype).view(rows, columns))
    elif result.numel():
        tile, warps = launch_shape(columns // 8)
        with launch_on(blocks):
            mxfp4_dequantize_kernel[(rows, triton.cdiv(columns // 8, tile))](
                blocks.view(torch.int32), scales.contiguous(), result, columns // 8, result.stride(0), WORDS=tile,
                num_warps=warps,
            )  # fmt: skip
    return result.view(*lead, columns) if out is None else out


def dequantize_mxfp4_reference(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The formula in plain torch."""
    table = torch.tensor([*_MAGNITUDES, *(-v for v in _MAGNITUDES)], device=blocks.device)
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()
    exponent = scales.int()
    power = torch.where(exponent > 0, exponent << 23, 1 << 22).int().view(torch.float32)  # 2^-127 is subnormal
    power = torch.where(scales == 255, torch.nan, power)
    return (table[nibbles] * power[..., None]).flatten(-2).to(dtype)


def launch_shape(row_words: int) -> tuple[int, int]:
    """Words of a tile (eight values each), and warps."""
    tile = min(2048, max(32, triton.next_power_of_2(row_words)))
    return tile, max(1, tile // 256)


@triton.jit
def decode_e2m1(nibble, power):
    """float32 values of E2M1 nibbles: as float16 bits they are the value times 2^-14, subnormals included."""
    bits = ((nibble & 7) << 9) | ((nibble & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0 * power


@triton.jit
def mxfp4_dequantize_kernel(words, scales, out, row_words, stride_out, WORDS: tl.constexpr):
    """One program writes 8 * WORDS columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    words += row * row_words
    scales += row * (row_words // 4)
    out += row * stride_out
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = word < row_words
    packed = tl.load(words + word, mask, other=0)
    exponent = tl.load(scales + word // 4, mask, other=0).to(tl.int32)
    power = tl.where(exponent > 0, exponent << 23, 1 << 22).to(tl.float32, bitcast=True)
    power = tl.where(exponent == 255, float("nan"), power)
    values = interleave_eight(
        decode_e2m1(packed, power), decode_e2m1(packed >> 4, power), decode_e2m1(packed >> 8, power),
        decode_e2m1(packed >> 12, power), decode_e2m1(packed >> 16, power), decode_e2m1(packed >> 20, power),
        decode_e2m1(packed >> 24, power), decode_e2m1(packed >> 28, power),
    )  # fmt: skip
    target = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + target, values.to(out.dtype.element_ty), mask[:, None])


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"words": "*i32", "scales": "*u8", "out": f"*{float_dtype}", "row_words": "i32", "stride_out": "i32"}
    tile, warps = launch_shape(4096)
    return [(mxfp4_dequantize_kernel, signature, {"WORDS": tile}, {"num_warps": warps})]
