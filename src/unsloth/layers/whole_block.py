"""A decoder block as one differentiable function, that decides itself what it keeps for its backward.

    a = n1(x)     q, k, v = R (a W_qkv)     o = attention(q, k, v)     h = x + o W_o     y = h + M(n2(h))

with adapters on every linear layer (:mod:`unsloth.kernels.lora_linear`), R the rotary embedding, n norms and M the
gated MLP (:mod:`unsloth.kernels.lora_mlp`). Composed of separate functions, a block builds and walks a graph of a dozen
nodes, three times where it is recomputed, and the GPU waits for it. Here forward, recomputation and backward are plain
calls of kernels, one after the other.

Kept in every case: x, o with its log-sum-exp (so that the scores are not computed twice), and h A_d^T of the down
projection's adapter. Recomputed, or kept as well: q, k, v, h, gate and up, and the thin products. Never kept:
normalized inputs and ``a(gate) up``, which one pass over memory makes again; never recomputed: the output of the down
projection, which the backward does not read. Tensors are kept on the function's context, not by ``save_for_backward``,
so that hooks on saved tensors (and with them torch's checkpointing around the block) find nothing to do.

Shapes: B batch, T tokens, M = B T, K hidden features, H and Hk heads of D, I features of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unsloth.core.errors import ModelError
from unsloth.kernels.causal_attention import Attended, Visible, attention_backward, attention_forward
from unsloth.kernels.glu_adapters import glu_forward
from unsloth.kernels.lora_linear import adapter_gradients, flatten_adapters, project_gradients, project_input
from unsloth.kernels.lora_mlp import MlpKept, finish_gradients, mlp_backward
from unsloth.kernels.lora_weights import LoraGroup
from unsloth.kernels.rope import RopeTables
from unsloth.layers.direct import HeadNorms, norm, norm_gradient, rotate
from unsloth.layers.linear import Frozen, weights_of
from unsloth.layers.norm import NormOptions


@dataclass(frozen=True, slots=True)
class Parts:
    """What one call of a block computes with, besides its input.

    Attributes:
        norms: Weight and options of n1 and of n2.
        qkv: The projections, or the one that holds their rows.
        output: W_o.
        gate_up: Gate and up.
        down: The third of the MLP.
        heads: (H, Hk, D).
        head_norms: Weights of the norms of every head of q and of k, or None.
        head_norm: What those compute.
        tables: Of the rotary embedding; None on layers without.
        visible: Which keys a query sees.
        scale: Of the scores.
        backend: Of attention.
        activation: Of the MLP.
        recompute: Whether to keep the least.
    """

    norms: tuple[tuple[torch.Tensor, NormOptions], tuple[torch.Tensor, NormOptions]]
    qkv: tuple[Frozen, ...]
    output: Frozen
    gate_up: tuple[Frozen, Frozen]
    down: Frozen
    heads: tuple[int, int, int]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    head_norm: NormOptions | None
    tables: RopeTables | None
    visible: Visible
    scale: float
    backend: str
    activation: str
    recompute: bool

    def linears(self) -> tuple[Frozen, ...]:
        """All of them, in the order of the function's adapters."""
        return (*self.qkv, self.output, *self.gate_up, self.down)


@dataclass(slots=True)
class _Least:
    """Kept in every case.

    Attributes:
        x: (M, K) the block's input.
        version: Of ``x``, as torch counts changes in place.
        attended: o and its log-sum-exp.
        t_d: (M, columns) of the down projection.
    """

    x: torch.Tensor
    version: int
    attended: Attended
    t_d: torch.Tensor


@dataclass(slots=True)
class _Rest:
    """Kept or recomputed.

    Attributes:
        qkv: (M, (H + 2 Hk) D), rotated in place unless heads are normalized.
        t_qkv: (M, columns).
        t_o: (M, columns).
        h: (M, K).
        gated: (M, 2 I + room).
        t_gu: (M, columns).
        groups: Groups of linears that were made to recompute, by name.
        inputs: (M, K) normalized inputs that were made to recompute, by name.
    """

    qkv: Any
    t_qkv: torch.Tensor
    t_o: torch.Tensor
    h: Any
    gated: Any
    t_gu: Any
    groups: dict[str, LoraGroup] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class _WholeBlock(torch.autograd.Function):
    """(x, parts, scales, a_0, b_0, a_1, ...) to y."""

    @staticmethod
    def forward(ctx, x, parts, scales, *pairs):
        """See the module."""
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y, least, rest = _forward(parts, flat, x.shape)
        ctx.parts, ctx.scales, ctx.pairs, ctx.shape = parts, scales, pairs, x.shape
        ctx.least, ctx.rest = least, None if parts.recompute else rest
        ctx.input = x.detach()
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of x and of every A and B."""
        least, rest, parts = ctx.least, ctx.rest, ctx.parts
        if least is None:
            raise ModelError(
                "a second backward through a block whose kept values are gone",
                do="Compute the forward again, or turn the plan off (model.unsloth_plan.undo()).",
            )
        if ctx.input._version != least.version:
            raise ModelError("a block's input was changed in place before its backward", do="Clone it first.")
        ctx.least = ctx.rest = None
        flat = grad.reshape(least.x.shape).contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            if rest is None:
                rest = _recompute(parts, least, ctx.shape)
            needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
            dx, found = _backward(parts, least, rest, flat, needs, ctx.shape)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, *finish_gradients(found, ctx.pairs, ctx.scales, needs[1:])


def whole_block(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The block's output (B, T, K) for x of that shape, contiguous, in the dtype of the products."""
    pairs, scales = flatten_adapters([linear.adapter for linear in parts.linears()])
    return _WholeBlock.apply(x, parts, scales, *pairs)


def group_of(linears: Sequence[Frozen], dtype: torch.dtype) -> LoraGroup:
    """Linears of one input, ready to multiply."""
    return LoraGroup(weights_of(linears, dtype), [linear.adapter for linear in linears], dtype)


def _forward(parts: Parts, x: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, _Least, _Rest]:
    qkv, t_qkv, _, _ = _project(parts, x)
    attended = attention_forward(*_heads(parts, qkv, shape), parts.visible, parts.scale, parts.backend)
    version = x._version
    rest = _to_gated(parts, x, attended, qkv, t_qkv, remember=False)
    group = group_of([parts.down], x.dtype)
    features = group.in_features
    wide = x.new_empty(x.shape[0], features + group.room)
    tail = _tail(wide, group)
    glu_forward(rest.gated[:, : 2 * features], parts.activation, group.a, wide[:, :features], tail)
    y = group.add_forward(rest.h, wide, tail)
    return y, _Least(x, version, attended, _apart(tail, group)), rest


def _recompute(parts: Parts, least: _Least, shape: torch.Size) -> _Rest:
    """What the backward reads and was not kept, and the groups and normalized inputs made on the way."""
    qkv, t_qkv, group, a = _project(parts, least.x)
    if parts.head_norms is None:
        _heads(parts, qkv, shape)
    rest = _to_gated(parts, least.x, least.attended, qkv, t_qkv, remember=True)
    rest.groups["qkv"], rest.inputs["qkv"] = group, a
    return rest


def _project(parts: Parts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LoraGroup, torch.Tensor]:
    """(q, k and v before rotation, t_qkv, the group, n1(x))."""
    group = group_of(parts.qkv, x.dtype)
    wide = x.new_empty(x.shape[0], x.shape[1] + group.room)
    normed = wide[:, : x.shape[1]]
    norm(x, *parts.norms[0], normed)
    tail = _thin(wide, group)
    qkv = group.forward(wide, tail, [linear.bias for linear in parts.qkv])
    return qkv, _apart(tail, group), group, normed


def _to_gated(
    parts: Parts, x: torch.Tensor, attended: Attended, qkv: torch.Tensor, t_qkv: torch.Tensor, *, remember: bool
) -> _Rest:
    """From attention's output to gate and up; ``remember`` says whether groups and inputs will be read again."""
    group = output = group_of([parts.output], x.dtype)
    wide, tail = project_input(attended.out.reshape(x.shape[0], -1), group)
    added = group.forward(wide, tail, [parts.output.bias])
    t_o = _apart(tail, group)
    if not remember:
        del output
    del wide, tail
    group = group_of(parts.gate_up, x.dtype)
    wide = x.new_empty(x.shape[0], x.shape[1] + group.room)
    weight, options = parts.norms[1]
    h = norm(added, weight, options, wide[:, : x.shape[1]], residual=x)
    del added
    tail = _thin(wide, group)
    width = sum(group.outs)
    gated = x.new_empty(x.shape[0], width + group.room)
    group.forward(wide, tail, [None, None], out=gated[:, :width])
    rest = _Rest(qkv, t_qkv, t_o, h, gated, _apart(tail, group))
    if remember:
        rest.groups.update(output=output, gate_up=group)
        rest.inputs.update(gate_up=wide[:, : x.shape[1]])
    return rest


def _heads(
    parts: Parts, qkv: torch.Tensor, shape: torch.Size, kept: list[HeadNorms] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q (B, T, H, D), k and v, normalized and rotated: in place, or anew where heads are normalized.

    ``kept`` is given the means to differentiate the latter.
    """
    heads, key_heads, size = parts.heads
    q, k, v = qkv.view(*shape[:2], -1, size).split((heads, key_heads, key_heads), dim=2)
    if parts.head_norms is not None and parts.head_norm is not None and parts.tables is not None:
        normed = HeadNorms(
            q.transpose(1, 2), k.transpose(1, 2), parts.head_norms, parts.head_norm, parts.tables, kept is not None
        )
        if kept is not None:
            kept.append(normed)
        return normed.outputs[0].transpose(1, 2), normed.outputs[1].transpose(1, 2), v
    if parts.tables is not None and kept is None:
        rotate(q.transpose(1, 2), k.transpose(1, 2), parts.tables)
    return q, k, v


def _backward(
    parts: Parts, least: _Least, rest: _Rest, grad: torch.Tensor, needs: Sequence[bool], shape: torch.Size
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(dx, dA and dB of every linear, not yet scaled)."""
    x, dtype, first = least.x, least.x.dtype, len(parts.qkv)
    o_needs, mlp_needs = needs[1 + 2 * first : 3 + 2 * first], needs[3 + 2 * first :]
    kept = MlpKept(_input(parts, 1, rest.h, rest.inputs.pop("gate_up", None)), rest.t_gu, rest.gated, least.t_d)
    dx, mlp = mlp_backward(
        _getter(rest, "gate_up", parts.gate_up, dtype),
        lambda: group_of([parts.down], dtype),
        kept,
        grad,
        parts.activation,
        (True, *mlp_needs),
        overwrite=True,
    )
    del kept
    rest.gated = rest.t_gu = None
    weight, options = parts.norms[1]
    dh = norm_gradient(dx, rest.h, weight, options, grad)
    del dx
    rest.h = None

    out = least.attended.out
    group = _getter(rest, "output", [parts.output], dtype)()
    do, o = _linears_backward(group, [dh], out.reshape(x.shape[0], -1), rest.t_o, (True, *o_needs))
    assert do is not None
    grads = _attention_backward(parts, least, rest, do.view(out.shape), shape)
    del do, out
    group = _getter(rest, "qkv", parts.qkv, dtype)()
    normed = _input(parts, 0, x, rest.inputs.pop("qkv", None))
    grads = grads if first > 1 else [torch.cat(grads, dim=1)]
    dx, qkv = _linears_backward(group, grads, normed, rest.t_qkv, (needs[0], *needs[1 : 1 + 2 * first]))
    if dx is not None:
        weight, options = parts.norms[0]
        dx = norm_gradient(dx, x, weight, options, dh)
    return dx, [*qkv, *o, *mlp]


def _attention_backward(
    parts: Parts, least: _Least, rest: _Rest, do: torch.Tensor, shape: torch.Size
) -> list[torch.Tensor]:
    """(M, features) gradients of q, k and v as the projections left them."""
    norms: list[HeadNorms] = []
    q, k, v = _heads(parts, rest.qkv, shape, norms)
    dq, dk, dv = attention_backward(do, q.detach(), k.detach(), v, least.attended, parts.visible, parts.scale)
    del q, k, v
    rest.qkv = None
    if norms:
        dq, dk = (x.transpose(1, 2) for x in norms[0].gradient(dq.transpose(1, 2), dk.transpose(1, 2)))
    elif parts.tables is not None:
        rotate(dq.transpose(1, 2), dk.transpose(1, 2), parts.tables, back=True)
    return [x.reshape(least.x.shape[0], -1) for x in (dq, dk, dv)]


def _linears_backward(
    group: LoraGroup, grads: list[torch.Tensor], x: torch.Tensor, t: torch.Tensor, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    wide, p = project_gradients(grads, group)
    dx = group.input_gradient(wide, p) if needs[0] else None
    return dx, adapter_gradients(group, x, t, wide, p, needs[1:], scaled=False)


def _getter(rest: _Rest, name: str, linears: Sequence[Frozen], dtype: torch.dtype) -> Callable[[], LoraGroup]:
    """Yields the group that recomputing made, and forgets it there; else makes it."""

    def get() -> LoraGroup:
        group = rest.groups.pop(name, None)
        return group_of(linears, dtype) if group is None else group

    return get


def _input(parts: Parts, which: int, x: torch.Tensor, made: torch.Tensor | None) -> torch.Tensor:
    """The normalized input of a group: as recomputing made it, or made now."""
    if made is None:
        made = torch.empty_like(x)
        norm(x, *parts.norms[which], made)
    return made


def _tail(wide: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """Where projections go: behind the features of ``wide`` (M, features + room), or on their own."""
    return wide[:, group.in_features :] if group.room else wide.new_empty(wide.shape[0], group.columns)


def _thin(wide: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    tail = _tail(wide, group)
    if group.columns:
        torch.mm(wide[:, : group.in_features], group.a.t(), out=tail)
    return tail


def _apart(tail: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """Projections that outlive the wide buffer they are a part of."""
    return tail.clone() if group.room else tail
