"""4-bit weights in bitsandbytes' layout: what they are, and their dequantization in one pass.

A weight [N, K] is stored flat in row-major order, two values a byte, the first in the high nibble. With ``code`` the 16
values of the data type (NF4 or FP4), and blocks of ``blocksize`` consecutive values::

    w[i] = code[nibble[i]] * scale[i // blocksize]

The scales are float32, or quantized a second time to bytes ("double quantization") in blocks of 256 scales::

    scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + offset

Products are float32, rounded once to the output dtype, without fused multiply-add, so that the result equals
bitsandbytes' own to the bit. Dettmers et al., "QLoRA", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import FLOAT_DTYPES, can_launch, interpreting, launch_on


@dataclass(frozen=True)
class NF4Weight:
    """A quantized matrix, its tensors checked and brought to the dtypes that the kernels read.

    Attributes:
        packed: Flat uint8, N * K / 2 bytes.
        absmax: Scale of each block: float32, or uint8 codes with double quantization.
        code: float32 [16].
        shape: (N, K).
        dtype: Dtype that the matrix had and is dequantized to.
        blocksize: Values to a scale.
        nested_code: float32 [256], or None without double quantization.
        nested_absmax: float32, or None.
        offset: float32 of one element, or None.
        nested_blocksize: Scales to a nested scale.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int = 64
    nested_code: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.packed.dtype != torch.uint8 or self.packed.numel() * 2 != n * k or not self.packed.is_contiguous():
            got = (self.packed.dtype, tuple(self.packed.shape), self.packed.is_contiguous())
            raise ConfigError("4-bit weight: wrong packed values", got=got, do=f"Pass {n * k // 2} contiguous bytes.")
        power = self.blocksize >= 8 and self.blocksize & (self.blocksize - 1) == 0
        if not power or self.absmax.numel() != -(-n * k // self.blocksize):
            got = (self.blocksize, self.absmax.numel())
            raise ConfigError("4-bit weight: blocksize and scales do not fit", got=got, do="Pass one scale a block.")
        nested = (self.nested_code, self.nested_absmax, self.offset)
        if (self.absmax.dtype == torch.uint8) != all(x is not None for x in nested):
            do = "Pass float32 scales alone, or uint8 scales with nested_code, nested_absmax and offset."
            raise ConfigError("4-bit weight: scales are half nested", got=self.absmax.dtype, do=do)
        for name, x in (
            ("absmax", self.absmax),
            ("code", self.code),
            ("nested_code", nested[0]),
            ("offset", nested[2]),
        ):
            if x is not None and x.device != self.packed.device:
                do = f"Move it to {self.packed.device}."
                raise ConfigError(f"4-bit weight: {name} is on another device", got=str(x.device), do=do)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_code is not None

    @classmethod
    def from_quant_state(cls, packed: torch.Tensor, state) -> NF4Weight:
        """Read a bitsandbytes ``QuantState``; ``packed`` may be stored as any dtype (``quant_storage``).

        Refuses a weight that bitsandbytes repacked for its CPU kernels, which is no longer in the documented layout.
        """
        if getattr(state, "packing_format_for_cpu", None):
            do = "Set module.support_avx512bf16_for_cpu = False on every Linear4bit after loading."
            raise ConfigError("4-bit weight was repacked for bitsandbytes' CPU kernels", do=do)
        nested = {}
        if state.nested:
            nested = {
                "nested_code": state.state2.code.float(),
                "nested_absmax": state.state2.absmax.float(),
                "offset": torch.as_tensor(state.offset, dtype=torch.float32, device=packed.device),
                "nested_blocksize": state.state2.blocksize,
            }
        absmax = state.absmax if state.absmax.dtype == torch.uint8 else state.absmax.float()
        return cls(
            packed.detach().view(torch.uint8).reshape(-1), absmax, state.code.float(), tuple(state.shape), state.dtype,
            state.blocksize, **nested,
        )  # fmt: skip

    def words(self) -> torch.Tensor | None:
        """The packed bytes as int32, eight values a word; None where they cannot be seen that way."""
        if self.packed.numel() % 4 or self.packed.storage_offset() % 4 or self.packed.data_ptr() % 16:
            return None
        return self.packed.view(torch.int32)


def dequantize_nf4(
    weight: NF4Weight, *, out: torch.Tensor | None = None, dtype: torch.dtype | None = None, fast: bool = True
) -> torch.Tensor:
    """Dequantize a 4-bit matrix.

    Args:
        weight: The quantized matrix.
        out: [N, K] with adjacent columns to write into, for example the first columns of a wider buffer; None
            allocates.
        dtype: Output dtype where ``out`` is None; None means the weight's own.
        fast: False takes the plain-torch reference.

    Returns:
        The matrix [N, K].
    """
    n, k = weight.shape
    if out is None:
        out = torch.empty((n, k), dtype=dtype or weight.dtype, device=weight.packed.device)
    check_output("dequantize_nf4", out, weight.shape, weight.packed.device)
    words = weight.words()
    flat = out.is_contiguous()
    if not (fast and words is not None and (flat or k % 8 == 0) and can_launch(out)):
        return out.copy_(dequantize_nf4_reference(weight, out.dtype))
    if out.numel():
        tile, warps = launch_shape()
        with launch_on(out):
            nf4_dequantize_kernel[(triton.cdiv(words.numel(), tile),)](
                words, *scale_arguments(weight), out, words.numel(), k, out.stride(0), BLOCKSIZE=weight.blocksize,
                NESTED=weight.nested, NESTED_BLOCKSIZE=weight.nested_blocksize, FLAT=flat, SHUFFLE=shuffles(),
                WORDS=tile, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The formula in plain torch."""
    high, low = weight.packed >> 4, weight.packed & 15
    values = weight.code[torch.stack((high, low), -1).reshape(-1).int()]
    scale = weight.absmax
    if weight.nested:
        nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: scale.numel()]
        scale = weight.nested_code[scale.int()] * nested + weight.offset
    scale = scale.repeat_interleave(weight.blocksize)[: values.numel()]
    return (values * scale).view(weight.shape).to(dtype or weight.dtype)


def check_output(op: str, out: torch.Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raise unless a matrix of ``shape`` can be written into ``out``."""
    rows_apart = out.dim() == 2 and (out.stride(0) >= out.shape[1] or out.shape[0] <= 1) and out.stride(1) == 1
    if tuple(out.shape) != tuple(shape) or (out.numel() and not rows_apart):
        do = f"Pass a matrix of shape {tuple(shape)} whose columns are adjacent."
        raise ConfigError(f"{op}: out cannot hold the result", got=(tuple(out.shape), out.stride()), do=do)
    if out.dtype not in (*FLOAT_DTYPES, torch.float64) or out.device != device:
        do = f"Pass a float tensor on {device}."
        raise ConfigError(f"{op}: out cannot hold the result", got=(out.dtype, str(out.device)), do=do)


def scale_arguments(weight: NF4Weight) -> tuple:
    """The kernels' arguments that say how to decode: code, absmax, nested_code, nested_absmax, offset."""
    return weight.code, weight.absmax, weight.nested_code, weight.nested_absmax, weight.offset


def shuffles() -> bool:
    """Whether to look values up across the lanes of a warp (GPU) rather than in memory (interpreter)."""
    return not interpreting()


def launch_shape() -> tuple[int, int]:
    """Words of a tile (eight values each), and warps."""
    return 2048, 8


# Eight look-ups in a table that lies across the lanes of a warp, entry i in lanes i and i + 16. A shuffle reads five
# bits of its lane operand, so the nibble needs no mask: the bit above it only picks between the two copies.
_SHUFFLE_DECODE = "\n".join(
    ["{", ".reg .b32 t;"]
    + [
        line
        for i, shift in enumerate((4, 0, 12, 8, 20, 16, 28, 24))
        for line in (f"shr.u32 t, $8, {shift};", f"shfl.sync.idx.b32 ${i}, $9, t, 31, 0xffffffff;")
    ]
    + ["}"]
)
SHUFFLE_DECODE = tl.constexpr(_SHUFFLE_DECODE)


@triton.jit
def lane_table(code, SHUFFLE: tl.constexpr):
    """The value of ``code`` that this thread's lane holds for the others (a scalar that differs between lanes)."""
    if SHUFFLE:
        lane = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %laneid; and.b32 $0, t, 15; }",
            "=r,r",
            [0],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return tl.load(code + lane)
    else:
        return 0.0


@triton.jit
def decode_words(words, code, table, SHUFFLE: tl.constexpr):
    """The eight values of each word, in order, as eight float32 tensors of the words' shape.

    A word holds four bytes, lowest first; of each byte the high nibble comes first.
    """
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            SHUFFLE_DECODE, "=f,=f,=f,=f,=f,=f,=f,=f,r,f", [words, table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(code + ((words >> 4) & 15)),
            tl.load(code + (words & 15)),
            tl.load(code + ((words >> 12) & 15)),
            tl.load(code + ((words >> 8) & 15)),
            tl.load(code + ((words >> 20) & 15)),
            tl.load(code + ((words >> 16) & 15)),
            tl.load(code + ((words >> 28) & 15)),
            tl.load(code + ((words >> 24) & 15)),
        )


@triton.jit
def interleave_eight(v0, v1, v2, v3, v4, v5, v6, v7):
    """Stack eight tensors along a new last dimension, which lies within a thread."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    both = tl.join(even, odd)
    return tl.reshape(both, v0.shape + [8])


@triton.jit
def block_scales(
    block, mask, absmax, nested_code, nested_absmax, offset, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr
):
    """float32 scales of the blocks numbered ``block``."""
    if NESTED:
        index = tl.load(absmax + block, mask, other=0).to(tl.int32)
        nested = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask, other=0.0)
        return tl.load(nested_code + index) * nested + tl.load(offset)
    else:
        return tl.load(absmax + block, mask, other=0.0)


@triton.jit
def nf4_dequantize_kernel(
    words, code, absmax, nested_code, nested_absmax, offset, out, count, columns, stride_out,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, FLAT: tl.constexpr,
    SHUFFLE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program writes 8 * WORDS consecutive values."""
    table = lane_table(code, SHUFFLE)
    base = tl.program_id(0) * WORDS
    local = tl.arange(0, WORDS)
    mask = base + local < count
    packed = tl.load(words + base + local, mask, other=0)
    scale = block_scales(
        (base + local) // (BLOCKSIZE // 8), mask, absmax, nested_code, nested_absmax, offset, NESTED, NESTED_BLOCKSIZE
    )
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_words(packed, code, table, SHUFFLE)
    values = interleave_eight(
        v0 * scale, v1 * scale, v2 * scale, v3 * scale, v4 * scale, v5 * scale, v6 * scale, v7 * scale
    )
    first = base.to(tl.int64) * 8
    target = local * 8
    if not FLAT:
        row = first // columns
        target += (first - row * columns).to(tl.int32)
        target = (target // columns).to(tl.int64) * (stride_out - columns) + target
        first = row * stride_out
    target = target[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out + first + target, values.to(out.dtype.element_ty), mask[:, None])


def scale_signature() -> dict[str, str]:
    """Types of the arguments that :func:`scale_arguments` gives, with double quantization."""
    return {
        "words": "*i32", "code": "*fp32", "absmax": "*u8", "nested_code": "*fp32", "nested_absmax": "*fp32",
        "offset": "*fp32",
    }  # fmt: skip


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = scale_signature() | {"out": f"*{float_dtype}"}
    signature |= dict.fromkeys(("count", "columns", "stride_out"), "i32")
    constants = {"BLOCKSIZE": 64, "NESTED": True, "NESTED_BLOCKSIZE": 256, "SHUFFLE": True}
    constants["WORDS"], warps = launch_shape()
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return [(nf4_dequantize_kernel, signature, {**constants, "FLAT": flat}, options) for flat in (True, False)]
