"""Norms and rotary embedding with forward and backward as plain calls, for a block that does its own backward.

The kernels where they can be launched, their references elsewhere. Shapes: M tokens, N features; B, H, T, D as in
:mod:`unsloth.layers.attention`.
"""

from __future__ import annotations

import torch

from unsloth.kernels.dispatch import can_launch, compute_dtype
from unsloth.kernels.glu import glu_backward
from unsloth.kernels.glu_adapters import gated_activation_reference
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
    *,
    trained: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gradient (M, N) of what was normalized, ``h``, that of the weight if it is trained).

    The former is through the norm from ``dy``, plus ``dh`` that came past it; written into ``out``, contiguous, if that
    is given.
    """
    if h.shape[1] <= MAX_COLUMNS and can_launch(h, weight):
        return rms_norm_backward(dy, h, weight, options.eps, options.offset, dh, trained, out=out)
    with torch.enable_grad():
        leaf, gain = h.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        y = rms_norm_reference(leaf, gain, options.eps, options.offset)
        found = torch.autograd.grad(y, [leaf, gain] if trained else [leaf], dy.to(y.dtype))
    return torch.add(found[0], dh, out=out), found[1] if trained else None


def glu_gradients(dh: torch.Tensor, gated: torch.Tensor, activation: str) -> None:
    """Overwrite gate and up, side by side in ``gated`` (M, 2 I), with their gradients, and ``dh`` (M, I) with h."""
    gate, up = gated.chunk(2, dim=1)
    if can_launch(dh, gated):
        glu_backward(dh, gate, up, activation, dgate=gate, dup=up, h=dh)
        return
    with torch.enable_grad():
        leaves = [x.detach().to(compute_dtype(x.dtype)).requires_grad_() for x in (gate, up)]
        h = gated_activation_reference(leaves[0], leaves[1], activation)
        found = torch.autograd.grad(h, leaves, dh.to(h.dtype))
    for to, value in zip((gate, up, dh), (*found, h.detach()), strict=True):
        to.copy_(value)


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
        weights: Of the norms, (D,) each.
        options: Of the norms.
        tables: Of the embedding.
        differentiable: Whether :meth:`gradient` will be called.
        trained: Whether the weights want gradients, too.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        options: NormOptions,
        tables: RopeTables,
        differentiable: bool,
        trained: bool = False,
    ) -> None:
        self.inputs = tuple(x.detach().requires_grad_(differentiable) for x in (q, k))
        weights = tuple(x.detach().requires_grad_(differentiable and trained) for x in weights)  # type: ignore[assignment]
        self.inputs += weights if trained else ()
        with torch.set_grad_enabled(differentiable):
            self.outputs = qk_norm_rope(
                self.inputs[0],
                self.inputs[1],
                weights[0],
                weights[1],
                tables.cos,
                tables.sin,
                eps=options.eps,
                offset=options.offset,
                rotary_dim=tables.rotary_dim,
                interleaved=tables.interleaved,
            )

    def gradient(self, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs, and of the weights if they are trained."""
        return torch.autograd.grad(self.outputs, self.inputs, (dq, dk))
