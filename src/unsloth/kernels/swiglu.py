"""SwiGLU: the gate of Llama, Qwen and Mistral MLPs.

    h = silu(gate) * up, with silu(x) = x * sigmoid(x)

The backward recomputes silu(gate) instead of keeping it: silu'(x) = sigmoid(x) * (1 + x * (1 - sigmoid(x))).
Arithmetic is float32, rounded once to the inputs' dtype. Shazeer, "GLU Variants Improve Transformer", 2020. The
Triton kernels are in :mod:`unsloth.kernels.glu`.
"""

from __future__ import annotations

import torch

from unsloth.kernels.dispatch import compute_dtype
from unsloth.kernels.glu import GatedLinearUnit, takes_kernel


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, fast: bool = True) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: Floating-point tensor of shape [..., F].
        up: Tensor of gate's shape and dtype.
        fast: False takes the plain-torch reference.

    Returns:
        Tensor of the same shape and dtype.
    """
    if not (takes_kernel("swiglu", gate, up) and fast):
        return swiglu_reference(gate, up)
    return GatedLinearUnit.apply(gate, up, "silu")


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch, computed in float32 (float64 for float64 inputs)."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = compute_dtype(dtype)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(dtype)
