"""Normalization: the forwards of RMS and layer norms, and the same as a function of a block that adds first.

    rms:    y = x / sqrt(mean(x^2) + eps) * (offset + w)      layer:  the same of x - mean(x)

Zhang and Sennrich, 2019; Ba, Kiros and Hinton, 2016. Kernels and references: :mod:`unsloth.kernels.rms_norm` and
:mod:`unsloth.kernels.layer_norm`, which compute in float32 and round once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from unsloth.kernels.layer_norm import add_layer_norm, layer_norm
from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
from unsloth.layers.fast import Fast


@dataclass(frozen=True)
class NormOptions:
    """What a norm computes.

    Attributes:
        kind: ``"rms"`` or ``"layer"``.
        eps: Added to the mean square, or to the variance.
        offset: Added to the weight.
        weight_last: Whether the family multiplies by the weight after it has rounded to the input's dtype, so that
            a float32 weight makes a float32 result of a 16-bit input. Else the result has the input's dtype.
    """

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0
    weight_last: bool = True


def normalize(x: torch.Tensor, weight: torch.Tensor, options: NormOptions) -> torch.Tensor:
    """Normalize the last dimension of ``x`` (..., N); ``weight`` is (N,)."""
    if options.weight_last and weight.dtype != x.dtype:
        bare = layer_norm(x, None, None, options.eps) if options.kind == "layer" else rms_norm(x, None, options.eps)
        return (weight + options.offset) * bare
    if options.kind == "layer":
        return layer_norm(x, _gain(weight, options), None, options.eps)
    return rms_norm(x, weight, options.eps, offset=options.offset)


def add_and_normalize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, options: NormOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the normalized sum, the sum) of ``x`` and ``residual``, in one pass where the dtypes allow."""
    if x.dtype != residual.dtype or weight.dtype != x.dtype:
        total = residual + x
        return normalize(total, weight, options), total
    if options.kind == "layer":
        return add_layer_norm(x, residual, _gain(weight, options), None, options.eps)
    return add_rms_norm(x, residual, weight, options.eps, offset=options.offset)


def _gain(weight: torch.Tensor, options: NormOptions) -> torch.Tensor:
    """For layer norms, whose kernel knows no offset."""
    return weight + options.offset if options.offset else weight


def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a norm module: (..., N) to (..., N)."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states)
    fast: Fast = self.unsloth_fast
    fast.took()
    return normalize(hidden_states, self.weight, fast.options)
