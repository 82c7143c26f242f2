"""Exponential, logarithm and reciprocal as the multiprocessor's special function unit gives them, for float32 tiles.

``tl.exp``, ``tl.log`` and division keep numbers below 2^-126 and are right (nearly) to the last place, in 6, 20 and 6
instructions; these take one or two, flush such numbers to zero, and are off by at most 2^-22, relatively (absolutely
for the logarithm). For kernels that wait for arithmetic rather than for memory. The interpreter runs no assembly: with
INTERPRET they are Triton's own. The assembly is declared impure: what is pure the compiler computes once for every
layout that it is needed in, and a value that is stored and multiplied is needed in two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(x, INTERPRET: tl.constexpr):
    """exp(x)."""
    if INTERPRET:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def logarithm(x, INTERPRET: tl.constexpr):
    """log(x)."""
    if INTERPRET:
        return tl.log(x)
    else:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def reciprocal(x, INTERPRET: tl.constexpr):
    """1 / x."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )
