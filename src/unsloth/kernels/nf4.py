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

# The 16 values of the data type, from the appendix of the QLoRA paper.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


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
        quant_type: "nf4" promises that ``code`` is :data:`NF4_CODE`, which lets products take a faster look-up.
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
    quant_type: str = ""

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.packed.dtype != torch.uint8 or self.packed.numel() * 2 != n * k or not self.packed.is_contiguous():
            got = (self.packed.dtype, tuple(self.packed.shape), self.packed.is_contiguous())
            raise ConfigError("4-bit weight: wrong packed values", got=got, do=f"Pass {n * k // 2} contiguous bytes.")
        power = self.blocksize >= 8 and self.blocksize & (self.blocksize - 1) == 0
        if not power or self.absmax.numel() != -(-n * k // self.blocksize):
            sizes = (self.blocksize, self.absmax.numel())
            raise ConfigError("4-bit weight: blocksize and scales do not fit", got=sizes, do="Pass one scale a block.")
        nested = (self.nested_code, self.nested_absmax, self.offset)
        if (self.absmax.dtype == torch.uint8) != all(x is not None for x in nested):
            do = "Pass float32 scales alone, or uint8 scales with nested_code, nested_absmax and offset."
            raise ConfigError("4-bit weight: scales are half nested", got=self.absmax.dtype, do=do)
        blocks = self.absmax.numel()
        for name, x, dtype, count in (
            ("absmax", self.absmax, torch.uint8 if self.nested else torch.float32, blocks),
            ("code", self.code, torch.float32, 16),
            ("nested_code", self.nested_code, torch.float32, 256),
            ("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // max(1, self.nested_blocksize))),
            ("offset", self.offset, torch.float32, 1),
        ):
            if x is None:
                continue
            if x.device != self.packed.device:
                do = f"Move it to {self.packed.device}."
                raise ConfigError(f"4-bit weight: {name} is on another device", got=str(x.device), do=do)
            if x.dtype != dtype or x.numel() != count or not x.is_contiguous():
                got, do = (x.dtype, tuple(x.shape), x.stride()), f"Pass {count} contiguous values of {dtype}."
                raise ConfigError(f"4-bit weight: {name} does not fit", got=got, do=do)

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
            state.blocksize, quant_type=state.quant_type, **nested,
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
                NESTED=weight.nested, NESTED_BLOCKSIZE=weight.nested_blocksize, FLAT=flat, LOOK_UP=exact_look_up(),
                WORDS=tile, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The formula in plain torch."""
    high, low = weight.packed >> 4, weight.packed & 15
    values = weight.code[torch.stack((high, low), -1).reshape(-1).int()]
    scale = weight.absmax
    if weight.nested_code is not None and weight.nested_absmax is not None:
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


def exact_look_up() -> str:
    """How kernels look up values where the result must be exact, see :func:`decode_words`."""
    return "memory" if interpreting() else "shuffle"


def launch_shape() -> tuple[int, int]:
    """Words of a tile (eight values each), and warps."""
    return 512, 4


def assembly(*lines: str) -> tl.constexpr:
    """Text for ``tl.inline_asm_elementwise``, with a scope of its own for registers."""
    return tl.constexpr("\n".join(["{", *lines, "}"]))


def _shuffled(*places: tuple[int, int]) -> list[str]:
    """Look up outputs by shuffles, given (output, bit position) pairs; $8 is the word, $9 the lane's table entry.

    The table lies across the lanes of a warp, entry i in lanes i and i + 16. A shuffle reads five bits of its lane
    operand, so a nibble needs no mask: the bit above it only picks between the two copies.
    """
    return [
        line
        for output, shift in places
        for line in (f"shr.u32 a, $8, {shift};", f"shfl.sync.idx.b32 ${output}, $9, a, 31, 0xffffffff;")
    ]


def _permuted() -> list[str]:
    """Look up outputs 0 to 3 by byte permutations: they come out as NF4 value + 3, to within 2^-14 (2^-13 at 1.0).

    value + 3 lies in [2, 4), so its float32 bits are 0x40 and then a fraction of which 14 bits are kept, as two tables
    of seven bits each. ``prmt`` picks four bytes out of eight by four nibbles. Where a nibble's top bit is set it
    replicates the byte's sign instead, which seven bits leave 0; so the look-ups in the lower and the upper half of a
    table (with the top bits inverted) can simply be or-ed.
    """
    fractions = [min(round((value + 1) * 2**13), 2**14 - 1) for value in NF4_CODE]
    high, low = [f >> 7 for f in fractions], [f & 127 for f in fractions]

    def registers(table: list[int]) -> list[int]:
        return [int.from_bytes(bytes(table[i : i + 4]), "little") for i in range(0, 16, 4)]

    (h0, h1, h2, h3), (l0, l1, l2, l3) = registers(high), registers(low)
    return [
        "xor.b32 x, $8, 0x8888;",
        f"prmt.b32 a, {h0}, {h1}, $8;",
        f"prmt.b32 b, {h2}, {h3}, x;",
        "or.b32 a, a, b;",
        f"prmt.b32 c, {l0}, {l1}, $8;",
        f"prmt.b32 d, {l2}, {l3}, x;",
        "or.b32 c, c, d;",
        "shl.b32 c, c, 1;",
        "prmt.b32 b, c, a, 0x5140;",
        "prmt.b32 d, c, a, 0x7362;",
        "prmt.b32 $0, b, 0x40, 0x4325;",
        "prmt.b32 $1, b, 0x40, 0x4105;",
        "prmt.b32 $2, d, 0x40, 0x4325;",
        "prmt.b32 $3, d, 0x40, 0x4105;",
    ]


_UPPER = ((4, 20), (5, 16), (6, 28), (7, 24))
_REGISTERS = ".reg .b32 a, b, c, d, x;"
SHUFFLE_ASSEMBLY = assembly(_REGISTERS, *_shuffled((0, 4), (1, 0), (2, 12), (3, 8), *_UPPER))
MIXED_ASSEMBLY = assembly(_REGISTERS, *_permuted(), *_shuffled(*_UPPER))


@triton.jit
def lane_table(code, LOOK_UP: tl.constexpr):
    """The value of ``code`` that this thread's lane holds for the others (a scalar that differs between lanes)."""
    if LOOK_UP == "memory":
        return 0.0
    else:
        lane = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %laneid; and.b32 $0, t, 15; }",
            "=r,r",
            [0],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return tl.load(code + lane)


@triton.jit
def decode_words(words, code, table, LOOK_UP: tl.constexpr):
    """The eight values of each word, in order, as eight float32 tensors of the words' shape.

    A word holds four bytes, lowest first; of each byte the high nibble comes first. LOOK_UP says how:

    - "memory": loads from ``code``; for the interpreter.
    - "shuffle": all eight from the lanes' table. Exact. Shuffles have a pipe of their own, which this fills.
    - "mixed": values 0 to 3 by arithmetic instead, which halves the shuffles. They come out with 3 added
      and rounded to 14 bits, so this is for products with 16-bit activations and NF4 only.
    """
    if LOOK_UP == "memory":
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
    else:
        return tl.inline_asm_elementwise(
            MIXED_ASSEMBLY if LOOK_UP == "mixed" else SHUFFLE_ASSEMBLY,
            "=f,=f,=f,=f,=f,=f,=f,=f,r,f", [words, table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip


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
    LOOK_UP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program writes 8 * WORDS consecutive values."""
    table = lane_table(code, LOOK_UP)
    base = tl.program_id(0) * WORDS
    local = tl.arange(0, WORDS)
    mask = base + local < count
    packed = tl.load(words + base + local, mask, other=0)
    scale = block_scales(
        (base + local) // (BLOCKSIZE // 8), mask, absmax, nested_code, nested_absmax, offset, NESTED, NESTED_BLOCKSIZE
    )
    v0, v1, v2, v3, v4, v5, v6, v7 = decode_words(packed, code, table, LOOK_UP)
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
    constants = {"BLOCKSIZE": 64, "NESTED": True, "NESTED_BLOCKSIZE": 256, "LOOK_UP": "shuffle"}
    constants["WORDS"], warps = launch_shape()
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return [(nf4_dequantize_kernel, signature, {**constants, "FLAT": flat}, options) for flat in (True, False)]
