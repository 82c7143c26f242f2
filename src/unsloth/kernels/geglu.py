"""GEGLU: the gate of Gemma MLPs, in its exact and its tanh form.

    h = gelu(gate) * up
    exact: gelu(x) = x/2 * (1 + erf(x / sqrt(2)))
    tanh:  gelu(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

The backward recomputes gelu(gate) instead of keeping it. Arithmetic is float32, rounded once to the inputs' dtype.
Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer", 2020. The
Triton kernels are in :mod:`unsloth.kernels.glu`.
"""

from __future__ import annotations

import torch

from unsloth.kernels.dispatch import compute_dtype
from unsloth.kernels.glu import GatedLinearUnit, takes_kernel


def geglu(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = True, fast: bool = True) -> torch.Tensor:
    """``gelu(gate) * up``.

    Args:
        gate: Floating-point tensor of shape [..., F].
        up: Tensor of gate's shape and dtype.
        tanh: Whether gelu is the tanh form (``gelu_pytorch_tanh``) or the exact one (``gelu``).
        fast: False takes the plain-torch reference.

    Returns:
        Tensor of the same shape and dtype.
    """
    if not (takes_kernel("geglu", gate, up) and fast):
        return geglu_reference(gate, up, tanh)
    return GatedLinearUnit.apply(gate, up, "gelu_tanh" if tanh else "gelu")


def geglu_reference(gate: torch.Tensor, up: torch.Tensor, tanh: bool = True) -> torch.Tensor:
    """The formula in plain torch, computed in float32 (float64 for float64 inputs)."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = compute_dtype(dtype)
    return (torch.nn.functional.gelu(gate.to(wide), approximate="tanh" if tanh else "none") * up.to(wide)).to(dtype)
