"""Round to the nearest bfloat16 where Triton's interpreter would truncate.

The interpreter converts float32 to bfloat16 by dropping bits, up to twice the error of a GPU's conversion. Kernels
whose result feeds further arithmetic call :func:`nearest` before storing; on a GPU it is the identity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unsloth.kernels import dispatch


def must_round(dtype: torch.dtype) -> bool:
    """The ROUND argument of kernels that store ``dtype``."""
    return dispatch.interpreting() and dtype == torch.bfloat16


@triton.jit
def nearest(value, ROUND: tl.constexpr):
    """``value`` (float32) as it is, or with ROUND the float32 that is its nearest bfloat16 (ties to even)."""
    if ROUND:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value
