"""A gated MLP with low-rank adapters on its three linears, as one operation.

Shapes: x (M, K), gate and up weights (I, K), down weight (H, I), frozen; adapters as in
:mod:`unsloth.kernels.lora_linear`; a an activation::

    [e | u] = [x | t_gu] [W_gu | sB_gu]^T             t_gu = x A_gu^T          gate and up are one group
    h = a(e) u            y = [h | t_d] [W_d | sB_d]^T     t_d = h A_d^T
    dh = [g | p_d] [W_d ; A_d]                         p_d = g sB_d
    dx = [de | du] W_gu + p_gu A_gu                    p_gu = [de sB_g | du sB_u]

The activation's kernels make t_d and the adapter gradients that need h, de or du on the way
(:mod:`unsloth.kernels.glu_adapters`). Saved for the backward: x, e, u, t_gu, t_d; h is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.adapter_products import adapter_products
from unsloth.kernels.append_projection import append_projection, matmul_wide
from unsloth.kernels.glu_adapters import gated_activation_reference, glu_backward, glu_forward
from unsloth.kernels.lora_linear import (
    check_input,
    check_linears,
    dense_weights,
    flatten_adapters,
    gather_adapters,
    lora_linears_reference,
    must_use_reference,
    product_dtype,
    project_gradients,
    project_input,
    unshared,
)
from unsloth.kernels.lora_weights import Adapter, LoraGroup, PaddedWeight, Weight


def lora_mlp_reference(
    x: torch.Tensor,
    gate_up: Sequence[Weight],
    down: Weight,
    adapters: Sequence[Adapter | None],
    activation: str = "silu",
) -> torch.Tensor:
    """The formula in plain torch; adapters of gate, up and down."""
    gate, up = lora_linears_reference(x, gate_up, adapters[:2])
    return lora_linears_reference(gated_activation_reference(gate, up, activation), [down], adapters[2:])[0]


class _LoraMlp(torch.autograd.Function):
    """(x, buffer, gate_up, down, activation, scales, dtype, a_gate, b_gate, a_up, b_up, a_down, b_down) to y."""

    @staticmethod
    def forward(ctx, x, buffer, gate_up, down, activation, scales, dtype, *pairs):
        """See the module; each group's weights are fetched when they are used, since they may share a buffer."""
        adapters = gather_adapters(pairs, scales)
        with torch.autocast(x.device.type, enabled=False):
            group = LoraGroup(gate_up, adapters[:2], dtype)
            check_input(x, group.in_features)
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            wide, projected, t_gu = project_input(flat, group, buffer)
            gated = group.forward(wide, projected, [None, None])
            del wide, projected
            group = _down_group(down, adapters, dtype, gated.shape[1] // 2)
            wide = torch.empty(flat.shape[0], group.in_features + group.room, dtype=dtype, device=x.device)
            h = wide[:, : group.in_features]
            tail = wide[:, group.in_features :] if group.room else wide.new_empty(flat.shape[0], group.columns)
            t_d = glu_forward(gated, activation, group.a, h, tail)
            y = group.forward(wide, tail, [None])
        ctx.save_for_backward(unshared(flat, buffer), t_gu, gated, t_d, *pairs)
        ctx.gate_up, ctx.down, ctx.activation, ctx.scales = gate_up, down, activation, scales
        ctx.dtype, ctx.shape, ctx.x_dtype = dtype, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of x and of every A and B."""
        x, t_gu, gated, t_d, *pairs = ctx.saved_tensors
        adapters, needs = gather_adapters(pairs, ctx.scales), ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            flat = grad.to(ctx.dtype).reshape(x.shape[0], grad.shape[-1])
            group = _down_group(ctx.down, adapters, ctx.dtype, gated.shape[1] // 2, again=False)
            dh, below = down_gradients(group, t_d, flat, needs[12])
            group = LoraGroup(ctx.gate_up, adapters[:2], ctx.dtype, again=False)
            dx, found = gate_up_gradients(
                group, GateUpKept(x, t_gu, gated), dh, below, ctx.activation, needs=(needs[0], *needs[7:11])
            )
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return dx, *[None] * 6, *finish_gradients(found, pairs, needs[7:])


@dataclass(frozen=True, slots=True)
class GateUpKept:
    """What the backward of gate and up reads of the forward.

    Attributes:
        x: (M, K).
        t_gu: (M, columns) x A^T of gate and up.
        gated: (M, 2 I) gate(x) and up(x).
    """

    x: torch.Tensor
    t_gu: torch.Tensor
    gated: torch.Tensor


@dataclass(frozen=True, slots=True)
class DownKept:
    """What the gradients of the down projection's adapter are made of.

    Attributes:
        grad: (M, H) of the output.
        t: (M, columns) h A^T.
        p: (M, columns) g sB.
        rank: Of the adapter, 0 for none.
        scale: s.
        needs_b: Whether B wants a gradient.
    """

    grad: torch.Tensor
    t: torch.Tensor
    p: torch.Tensor
    rank: int
    scale: float
    needs_b: bool


def down_gradients(
    group: LoraGroup, t_d: torch.Tensor, grad: torch.Tensor, needs_b: bool
) -> tuple[torch.Tensor, DownKept]:
    """(dh (M, I), what its adapter's gradients are made of) of ``grad`` (M, H)."""
    if group.room:
        wide = grad.new_empty(grad.shape[0], grad.shape[1] + group.room)
        copy, tail = wide[:, : grad.shape[1]], wide[:, grad.shape[1] :]
        p = grad.new_empty(tail.shape)
        append_projection(grad, group.stacked_sb(), tail, copy=copy, kept=p)
        dh = group.input_gradient([wide], tail)
    else:
        grads, p = project_gradients([grad], group)
        dh = group.input_gradient(grads, p)
    adapter = group.adapters[0]
    return dh, DownKept(grad, t_d, p, group.ranks[0], 1.0 if adapter is None else adapter.scale, needs_b)


def gate_up_gradients(
    group: LoraGroup,
    kept: GateUpKept,
    dh: torch.Tensor,
    below: DownKept,
    activation: str,
    needs: Sequence[bool],
    *,
    overwrite: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(dx or None, dA and dB of gate, up and down in float32).

    Args:
        group: Of gate and up.
        kept: Of the forward.
        dh: (M, I).
        below: Of :func:`down_gradients`.
        activation: As in the forward.
        needs: Whether x, and A and B of gate and of up, want a gradient.
        overwrite: Write the gradients of gate(x) and up(x) over ``kept.gated``.
        out: (M, K + room) whose first columns are to be dx.
    """
    ranks = group.rank_slices()
    wide = kept.gated if overwrite else torch.empty_like(kept.gated)
    thin = (kept.t_gu[:, ranks[0]], kept.t_gu[:, ranks[1]])
    gate, up = (1.0 if adapter is None else adapter.scale for adapter in group.adapters)
    da_d, db_g, db_u = glu_backward(dh, kept.gated, activation, below.p, thin, wide, (gate, up))
    if group.room and needs[0]:
        dx, p_gu = group.input_gradient_of_wide(wide, out=out)
    else:
        grads = [wide[:, part] for part in group.out_slices()]
        p_gu = _project_gated(grads, group)
        dx = group.input_gradient(grads, p_gu, out=out) if needs[0] else None
    da_gu, db_d = _thin_gradients(kept.x, p_gu, sum(group.ranks), below, needs[1] or needs[3])
    da_g, da_u = (None, None) if da_gu is None else (da_gu[ranks[0]], da_gu[ranks[1]])
    return dx, [da_g, db_g, da_u, db_u, da_d, db_d]


def _thin_gradients(
    x: torch.Tensor, p: torch.Tensor, rank: int, below: DownKept, needs_a: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dA (rank, K) of gate and up, dB (H, r) of down), in one launch where both are wanted."""
    if needs_a and below.needs_b and rank and below.rank:
        out = below.grad.shape[1]
        da, (db,) = adapter_products(x, p, below.grad, below.t, [out], [below.rank], [below.scale], rank_a=rank)
        return da, db
    da = matmul_wide(p.t(), x) if needs_a else None
    return da, matmul_wide(below.grad.t(), below.t).mul_(below.scale) if below.needs_b else None


def _down_group(
    down: Weight, adapters: Sequence[Adapter | None], dtype: torch.dtype, features: int, *, again: bool = True
) -> LoraGroup:
    group = LoraGroup([down], adapters[2:], dtype, again=again)
    if group.in_features != features:
        raise ConfigError(
            "The down projection does not fit gate and up",
            got=(group.in_features, features),
            do="Its input features must be their output features.",
        )
    return group


def _project_gated(grads: Sequence[torch.Tensor], group: LoraGroup) -> torch.Tensor:
    """p_gu (M, columns): de and du times their own sB, beside each other."""
    tail = grads[0].new_zeros(grads[0].shape[0], group.columns)
    for i, (part, ranks) in enumerate(zip(grads, group.rank_slices(), strict=True)):
        if group.ranks[i]:
            torch.mm(part, group.sb(i, part.dtype), out=tail[:, ranks])
    return tail


def finish_gradients(
    found: Sequence[torch.Tensor | None], pairs: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients cut to their adapter's rank, at the adapters' dtypes; None where not needed."""
    grads: list[torch.Tensor | None] = []
    for i, (grad, master, needed) in enumerate(zip(found, pairs, needs, strict=True)):
        if grad is None or master is None or not needed:
            grads.append(None)
            continue
        grad = grad[:, : master.shape[1]] if i % 2 else grad[: master.shape[0]]
        grads.append(grad.to(master.dtype))
    return grads


def lora_mlp(
    x: torch.Tensor,
    gate_up: Sequence[Weight] | PaddedWeight,
    down: Weight,
    adapters: Sequence[Adapter | None],
    activation: str = "silu",
    *,
    buffer: torch.Tensor | None = None,
    fast: bool = True,
) -> torch.Tensor:
    """``down(a(gate(x)) * up(x))`` with an adapter, or None, on each of the three.

    Args:
        x: (..., K).
        gate_up: Two (I, K) weights, or one :class:`PaddedWeight` of both (or a function that yields it).
        down: (H, I).
        adapters: Of gate, up and down.
        activation: "silu", "gelu" or "gelu_tanh".
        buffer: Holds x, as in :func:`unsloth.kernels.lora_linear.lora_linears`.
        fast: False for the plain computation.

    Returns:
        (..., H).
    """
    if len(adapters) != 3:
        raise ConfigError("An MLP has three linears", got=len(adapters), do="Pass an adapter or None for each.")
    weights = [gate_up] if isinstance(gate_up, PaddedWeight) or callable(gate_up) else list(gate_up)
    if x.dim():
        check_linears("lora_mlp gate and up", x, weights, adapters[:2], x.shape[-1])
    inner = next((w.shape[0] for w in weights if isinstance(w, torch.Tensor) and w.dim() == 2), None)
    if inner is not None and isinstance(down, torch.Tensor):
        check_linears("lora_mlp down", x, [down], adapters[2:], inner)
        if any(isinstance(w, torch.Tensor) and w.shape[0] != inner for w in weights):
            got = [tuple(w.shape) for w in weights if isinstance(w, torch.Tensor)]
            raise ConfigError("lora_mlp: gate and up differ in features", got=got, do="Pass two weights (I, K).")
    if not fast or must_use_reference([*weights, down], []):
        return lora_mlp_reference(x, dense_weights(weights), dense_weights([down])[0], adapters, activation)
    pairs, scales = flatten_adapters(adapters)
    buffer = None if buffer is None else buffer.detach()
    return _LoraMlp.apply(x, buffer, weights, down, activation, scales, product_dtype(x), *pairs)
