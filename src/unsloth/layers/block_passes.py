"""Forward and backward of a decoder block as plain calls of kernels, one after the other, without autograd.

    a = n1(x)     q, k, v = R (a W_qkv)     o = attention(q, k, v)     h = x + o W_o     y = h + M(n2(h))

with adapters on every linear layer (:mod:`unsloth.kernels.lora_linear`) or with weights that are trained themselves
(:mod:`unsloth.layers.own_gradients`), R the rotary embedding, n norms and M the gated MLP
(:mod:`unsloth.layers.block_mlp`).

The backward needs x, o with its log-sum-exp (so that the scores are not computed twice) and h A_d^T of the down
projection's adapter. The rest is q, k, v, h, gate and up, and the thin products: kept, or computed again. Never kept:
normalized inputs and ``a(gate) up``, which one pass over memory makes again; never computed again: the output of the
down projection, which the backward does not read.

Shapes: B batch, T tokens, M = B T, K hidden features, H and Hk heads of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unsloth.kernels.append_projection import append_projection
from unsloth.kernels.causal_attention import Attended, Visible, attention_backward, attention_forward
from unsloth.kernels.lora_linear import adapter_gradients, project_gradients, project_input
from unsloth.kernels.lora_weights import LoraGroup
from unsloth.kernels.rope import RopeTables
from unsloth.layers.block_mlp import MlpInner, MlpParts, apart, mlp_forward, mlp_gradients, tail_of
from unsloth.layers.direct import HeadNorms, norm, norm_gradient, rotate
from unsloth.layers.linear import Frozen
from unsloth.layers.norm import NormOptions
from unsloth.layers.own_gradients import OwnGradients
from unsloth.layers.site import Site
from unsloth.memory.keeper import Decision, Keeper


@dataclass(frozen=True, slots=True)
class Parts:
    """What one call of a block computes with, besides its input.

    Attributes:
        norm: Weight and options of n1.
        qkv: The projections, or the one that holds their rows.
        output: W_o.
        mlp: Of the other half.
        heads: (H, Hk, D).
        head_norms: Weights of the norms of every head of q and of k, or None.
        head_norm: What those compute.
        tables: Of the rotary embedding; None on layers without.
        visible: Which keys a query sees.
        scale: Of the scores.
        backend: Of attention.
        head_groups: In how many groups of heads attention's gradients are made.
        decision: What becomes of the block's values.
        keeper: Moves those that go.
        number: Of the block, from 0.
        trained: Whether weights of the block itself are, in which case it has no adapters.
    """

    norm: tuple[torch.Tensor, NormOptions]
    qkv: Site
    output: Site
    mlp: MlpParts
    heads: tuple[int, int, int]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    head_norm: NormOptions | None
    tables: RopeTables | None
    visible: Visible
    scale: float
    backend: str
    head_groups: int
    decision: Decision
    keeper: Keeper
    number: int
    trained: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return self.mlp.dtype

    def weights(self) -> list[torch.Tensor | None]:
        """Weight and bias of every linear layer, then the weights of n1, n2 and the norms of heads."""
        of_linears = [tensor for linear in self.linears() for tensor in (linear.base.weight, linear.bias)]
        return [*of_linears, self.norm[0], self.mlp.weight, *(self.head_norms or (None, None))]

    def own(self, needs: Sequence[bool], room: torch.Tensor | None = None) -> OwnGradients | None:
        """Takes in gradients of trained weights, if there are any; ``needs`` is of every A and B, then of those."""
        return OwnGradients(self.weights(), needs[2 * len(self.linears()) :], room) if self.trained else None

    def linears(self) -> tuple[Frozen, ...]:
        """All of them, in the order of the function's adapters."""
        return (*self.qkv.linears, *self.output.linears, *self.mlp.gate_up.linears, *self.mlp.down.linears)


@dataclass(slots=True)
class Rest:
    """Kept, or computed again.

    Attributes:
        qkv: (M, (H + 2 Hk) D), rotated in place unless heads are normalized.
        t_qkv: (M, columns).
        t_o: (M, columns).
        h: (M, K).
        mlp: Of the MLP, if it was kept.
        groups: Groups of linears that computing again has made, by name.
        normed: (M, K) n1(x), if computing again has made it.
    """

    qkv: Any
    t_qkv: torch.Tensor
    t_o: torch.Tensor
    h: Any
    mlp: MlpInner | None
    groups: dict[str, LoraGroup]
    normed: torch.Tensor | None = None


def forward_pass(
    parts: Parts, x: torch.Tensor, shape: torch.Size, *, keep: bool, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, Attended, torch.Tensor, Rest | None]:
    """(y (M, K), o with its log-sum-exp, h A_d^T, the rest if it is to be kept) of x (M, K), a batch of ``shape``.

    y is written into ``out``, which may be x, if that is given.
    """
    qkv, t_qkv, _, _ = _project(parts, x, again=True)
    attended = attention_forward(*_heads(parts, qkv, shape), parts.visible, parts.scale, parts.backend)
    if not keep:
        del qkv
    added, t_o, _ = _output(parts, attended.out, again=True)
    y, h, t_d, inner = mlp_forward(parts.mlp, added, x, keep=keep, out=out)
    return y, attended, t_d, Rest(qkv, t_qkv, t_o, h, inner, {}) if keep else None


def _again(parts: Parts, x: torch.Tensor, attended: Attended, shape: torch.Size) -> Rest:
    """The rest, computed again, with groups and normalized input where memory allows to reuse them."""
    qkv, t_qkv, group, normed = _project(parts, x, again=False)
    if parts.head_norms is None:
        _heads(parts, qkv, shape)
    added, t_o, output = _output(parts, attended.out, again=False)
    h = added.add_(x) if added.dtype == x.dtype else added + x
    if parts.decision.lean:
        return Rest(qkv, t_qkv, t_o, h, None, {})
    return Rest(qkv, t_qkv, t_o, h, None, {"qkv": group, "output": output}, normed)


def _project(
    parts: Parts, x: torch.Tensor, *, again: bool
) -> tuple[torch.Tensor, torch.Tensor, LoraGroup, torch.Tensor]:
    """(q, k and v before rotation, t_qkv, the group, n1(x))."""
    group = parts.qkv.group(parts.dtype, again=again)
    wide = x.new_empty(x.shape[0], x.shape[1] + group.room, dtype=parts.dtype)
    normed, tail = wide[:, : x.shape[1]], tail_of(wide, group)
    norm(x, *parts.norm, normed)
    if group.columns:
        append_projection(normed, group.a.t(), tail)
    qkv = group.forward(wide, tail, [linear.bias for linear in parts.qkv.linears])
    return qkv, apart(tail, group), group, normed


def _output(parts: Parts, out: torch.Tensor, *, again: bool) -> tuple[torch.Tensor, torch.Tensor, LoraGroup]:
    """(o W_o (M, K), t_o, the group)."""
    group = parts.output.group(out.dtype, again=again)
    wide, tail, kept = project_input(out.reshape(-1, out.shape[2] * out.shape[3]), group)
    return group.forward(wide, tail, [parts.output.linears[0].bias]), kept, group


def _heads(
    parts: Parts, qkv: torch.Tensor, shape: torch.Size, kept: list[HeadNorms] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q (B, T, H, D), k and v, normalized and rotated: in place, or anew where heads are normalized.

    For the backward, ``kept`` is given the means to differentiate the latter; what was rotated in place stays as it is.
    """
    heads, key_heads, size = parts.heads
    q, k, v = qkv.view(*shape[:2], -1, size).split((heads, key_heads, key_heads), dim=2)
    if parts.head_norms is not None and parts.head_norm is not None and parts.tables is not None:
        normed = HeadNorms(
            q.transpose(1, 2),
            k.transpose(1, 2),
            parts.head_norms,
            parts.head_norm,
            parts.tables,
            kept is not None,
            parts.trained,
        )
        if kept is not None:
            kept.append(normed)
        return normed.outputs[0].transpose(1, 2), normed.outputs[1].transpose(1, 2), v
    if parts.tables is not None and kept is None:
        rotate(q.transpose(1, 2), k.transpose(1, 2), parts.tables)
    return q, k, v


def backward_pass(
    parts: Parts,
    x: torch.Tensor,
    attended: Attended,
    t_d: torch.Tensor,
    rest: Rest | None,
    grad: torch.Tensor,
    needs: Sequence[bool],
    shape: torch.Size,
    out: torch.Tensor | None = None,
    own: OwnGradients | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(dx or None, dA and dB of every linear in float32) of ``grad`` (M, K); ``rest`` is used up.

    ``needs`` says whether x, and each A and B, want a gradient; dx is written into ``out``, which may be ``grad``, if
    that is given; ``own`` takes in the gradients of the block's own weights; the others are what the forward gave.
    """
    rest = _again(parts, x, attended, shape) if rest is None else rest
    count = len(parts.qkv.linears)
    first = 1 + 2 * count
    inner, rest.mlp = rest.mlp, None
    narrow = grad.to(parts.dtype)
    dn, mlp = mlp_gradients(parts.mlp, rest.h, t_d, inner, narrow, needs[first + 2 :], own, count + 1)
    del inner, narrow
    dh = _norm_gradient(dn, rest.h, (parts.mlp.weight, parts.mlp.options), grad, own, -3)
    del dn
    rest.h = None

    group = rest.groups.pop("output") if rest.groups else parts.output.group(parts.dtype, again=False)
    flat = attended.out.reshape(x.shape[0], -1)
    do, o = _linears_gradients(
        group, [dh.to(parts.dtype)], flat, rest.t_o, (True, *needs[first : first + 2]), own, count
    )
    del group  # a dequantized weight, before attention's gradients are made
    assert do is not None
    grads = _attention_gradients(parts, attended, rest, do.view(attended.out.shape), shape, own)
    del do, flat

    group = rest.groups.pop("qkv") if rest.groups else parts.qkv.group(parts.dtype, again=False)
    normed = rest.normed
    if normed is None:
        normed = torch.empty_like(x, dtype=parts.dtype)
        norm(x, *parts.norm, normed)
    grads = grads if len(grads) == len(parts.qkv.linears) else [torch.cat(grads, dim=1)]
    before = needs[0] or (own is not None and own.wants(-4))
    dx, qkv = _linears_gradients(group, grads, normed, rest.t_qkv, (before, *needs[1:first]), own, 0)
    if dx is not None:
        dx = _norm_gradient(dx, x, parts.norm, dh, own, -4, out)
    return dx if needs[0] else None, [*qkv, *o, *mlp]


def _norm_gradient(
    dy: torch.Tensor,
    h: torch.Tensor,
    norm: tuple[torch.Tensor, NormOptions],
    dh: torch.Tensor,
    own: OwnGradients | None,
    number: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    trained = own is not None and own.wants(number)
    dx, of_weight = norm_gradient(dy, h, *norm, dh, out, trained=trained)
    if own is not None and of_weight is not None:
        own.set(number, of_weight)
    return dx


def _attention_gradients(
    parts: Parts, attended: Attended, rest: Rest, do: torch.Tensor, shape: torch.Size, own: OwnGradients | None
) -> list[torch.Tensor]:
    """(M, features) gradients of q, k and v as the projections left them."""
    norms: list[HeadNorms] = []
    q, k, v = _heads(parts, rest.qkv, shape, norms)
    dq, dk, dv = attention_backward(
        do, q.detach(), k.detach(), v, attended, parts.visible, parts.scale, parts.head_groups
    )
    del q, k, v
    rest.qkv = None
    if norms:
        *found, of_q, of_k = (*norms[0].gradient(dq.transpose(1, 2), dk.transpose(1, 2)), None, None)[:4]
        dq, dk = (x.transpose(1, 2) for x in found)
        if own is not None and of_q is not None and of_k is not None:
            own.set(-2, of_q)
            own.set(-1, of_k)
    elif parts.tables is not None:
        rotate(dq.transpose(1, 2), dk.transpose(1, 2), parts.tables, back=True)
    return [x.reshape(do.shape[0] * do.shape[1], -1) for x in (dq, dk, dv)]


def _linears_gradients(
    group: LoraGroup,
    grads: list[torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    needs: Sequence[bool],
    own: OwnGradients | None,
    number: int,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """As backward_pass, of linear layers of one input, the first of which is ``number``."""
    if own is not None:
        for i, grad in enumerate(grads):
            own.add_linear(number + i, grad, x)
    wide, p = project_gradients(grads, group)
    dx = group.input_gradient(wide, p) if needs[0] else None
    return dx, adapter_gradients(group, x, t, wide, p, needs[1:])
