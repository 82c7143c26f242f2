"""Norms and rotary embedding with forward and backward as plain calls, for a block that does its own backward.

The kernels where they can be launched, their references elsewhere. Shapes: M tokens, N features; B, H, T, D as in
:mod:`unsloth.layers.attention`.
"""

from __future__ import annotations

import torch

from unsloth.kernels.dispatch import can_launch
from unsloth.kernels.qk_norm_rope import qk_norm_rope
from unsloth.kernels.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from unsloth.kernels.rope import RopeTables, rope_forward, rope_reference
from unsloth.kernels.row_norm import MAX_COLUMNS
from unsloth.layers.norm import NormOptions


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    options: NormOptions,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the RMS norm of ``x`` (M, N) plus ``residual`` into ``out``; return the sum (x itself without residual)."""
    if x.shape[1] <= MAX_COLUMNS and can_launch(x, weight):
        return rms_norm_forward(x, weight, options.eps, options.offset, residual, out)[1]
    total = x if residual is None else x + residual
    out.copy_(rms_norm_reference(total, weight, options.eps, options.offset))
    return total


def norm_gradient(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    options: NormOptions,
    dh: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(M, N) gradient of what was normalized (``h``): through the norm from ``dy``, plus ``dh`` that came past it.

    Written into ``out``, contiguous, if that is given.
    """
    if h.shape[1] <= MAX_COLUMNS and can_launch(h, weight):
        return rms_norm_backward(dy, h, weight, options.eps, options.offset, dh, out=out)[0]
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        y = rms_norm_reference(leaf, weight.detach(), options.eps, options.offset)
        found = torch.autograd.grad(y, leaf, dy)[0]
    return torch.add(found, dh, out=out)


def rotate(q: torch.Tensor, k: torch.Tensor, tables: RopeTables, *, back: bool = False) -> None:
    """Overwrite q (B, H, T, D) and k with their rotations, or with the gradients before rotation from those after."""
    if can_launch(q, k) and can_launch(tables.cos, tables.sin):
        rope_forward(q, k, tables, q, k, backward=back)
        return
    cos, sin = tables.by_token()
    for x in (q, k):
        x.copy_(rope_reference(x, cos, -sin if back else sin, tables.rotary_dim, tables.interleaved))


class HeadNorms:
    """Norms of the heads and rotary embedding together, with a backward that is asked for once.

    Args:
        q: (B, H, T, D) as the projection left it.
        k: (B, Hk, T, D).
        weights: Of the norms, (D,) each, frozen.
        options: Of the norms.
        tables: Of the embedding.
        differentiable: Whether :meth:`gradient` will be called.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        options: NormOptions,
        tables: RopeTables,
        differentiable: bool,
    ) -> None:
        self.inputs = tuple(x.detach().requires_grad_(differentiable) for x in (q, k))
        with torch.set_grad_enabled(differentiable):
            self.outputs = qk_norm_rope(
                self.inputs[0],
                self.inputs[1],
                weights[0].detach(),
                weights[1].detach(),
                tables.cos,
                tables.sin,
                eps=options.eps,
                offset=options.offset,
                rotary_dim=tables.rotary_dim,
                interleaved=tables.interleaved,
            )

    def gradient(self, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the inputs."""
        found = torch.autograd.grad(self.outputs, self.inputs, (dq, dk))
        return found[0], found[1]
