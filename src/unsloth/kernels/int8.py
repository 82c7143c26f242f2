"""Dequantization of 8-bit integer weights with a scale for each row, or for each group of columns of a row.

    w[n, k] = q[n, k] * scale[n, k // group]

One product in float32, rounded once. bitsandbytes' 8-bit layout (``CB`` int8 [N, K], ``SCB`` float32 [N], the largest
magnitude of each row) is ``scale = SCB / 127``: Dettmers et al., "LLM.int8()", 2022.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.dispatch import can_launch, launch_on
from unsloth.kernels.nf4 import check_output


def dequantize_int8(
    q: torch.Tensor,
    scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fast: bool = True,
) -> torch.Tensor:
    """Dequantize an 8-bit matrix.

    Args:
        q: int8 [N, K].
        scale: Floating point [N], or [N, G] with G dividing K.
        out: [N, K] with adjacent columns to write into, for example the first columns of a wider buffer; None
            allocates.
        dtype: Output dtype where ``out`` is None.
        fast: False takes the plain-torch reference.

    Returns:
        The matrix [N, K].
    """
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ConfigError(
            "dequantize_int8: q is no 8-bit matrix", got=(q.dtype, tuple(q.shape)), do="Pass int8 [N, K]."
        )
    n, k = q.shape
    scale = scale[:, None] if scale.dim() == 1 else scale
    fits = scale.dim() == 2 and scale.shape[0] == n and scale.shape[1] > 0 and k % scale.shape[1] == 0
    if not fits or not scale.is_floating_point() or scale.device != q.device:
        do = f"Pass floats [{n}] or [{n}, G] with G dividing {k}, on {q.device}."
        raise ConfigError("dequantize_int8: scale does not fit", got=(scale.dtype, tuple(scale.shape)), do=do)
    if out is None:
        out = torch.empty((n, k), dtype=dtype, device=q.device)
    check_output("dequantize_int8", out, (n, k), q.device)
    usable = q.is_contiguous() and k % 4 == 0 and (k // scale.shape[1]) % 4 == 0 and q.data_ptr() % 16 == 0
    if not (fast and usable and can_launch(out, scale)):
        return out.copy_(dequantize_int8_reference(q, scale, out.dtype))
    if out.numel():
        words, scale = q.view(torch.int32), scale.contiguous()
        tile, warps = launch_shape(k // 4)
        with launch_on(q):
            int8_dequantize_kernel[(n, triton.cdiv(k // 4, tile))](
                words, scale, out, k // 4, scale.shape[1], k // scale.shape[1] // 4, out.stride(0), WORDS=tile,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def dequantize_int8_reference(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The formula in plain torch, for scale [N, G]."""
    return (q.float() * scale.float().repeat_interleave(q.shape[1] // scale.shape[1], 1)).to(dtype)


def launch_shape(row_words: int) -> tuple[int, int]:
    """Words of a tile (four values each), and warps."""
    tile = min(2048, max(32, triton.next_power_of_2(row_words)))
    return tile, max(1, tile // 256)


@triton.jit
def int8_dequantize_kernel(words, scale, out, row_words, groups, group_words, stride_out, WORDS: tl.constexpr):
    """One program writes 4 * WORDS columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    words += row * row_words
    out += row * stride_out
    scale += row * groups
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = word < row_words
    packed = tl.load(words + word, mask, other=0)
    factor = tl.load(scale + word // group_words, mask, other=0.0).to(tl.float32)
    # a byte to the top of the word, then down again with its sign
    v0 = ((packed << 24) >> 24).to(tl.float32) * factor
    v1 = ((packed << 16) >> 24).to(tl.float32) * factor
    v2 = ((packed << 8) >> 24).to(tl.float32) * factor
    v3 = (packed >> 24).to(tl.float32) * factor
    values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [WORDS, 4])
    target = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out + target, values.to(out.dtype.element_ty), mask[:, None])


def compile_examples(float_dtype: str) -> list[tuple]:
    """Kernels with the argument types and options they are launched with, for compilation without a GPU."""
    signature = {"words": "*i32", "scale": "*fp32", "out": f"*{float_dtype}"}
    signature |= dict.fromkeys(("row_words", "groups", "group_words", "stride_out"), "i32")
    tile, warps = launch_shape(4096)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return [(int8_dequantize_kernel, signature, {"WORDS": tile}, options)]
