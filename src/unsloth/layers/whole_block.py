"""A decoder block as one differentiable function, that decides itself what it keeps for its backward.

Composed of separate functions (:mod:`unsloth.layers.block`), a block builds and walks a graph of a dozen nodes, three
times where it is recomputed, and the GPU waits for it. Here it is one node, whose forward, recomputation and backward
are those of :mod:`unsloth.layers.block_passes`: called one by one, or replayed (:mod:`unsloth.layers.block_graphs`).

Tensors are kept on the function's context, not by ``save_for_backward``, so that hooks on saved tensors (and with them
torch's checkpointing around the block) find nothing to do. Shapes as in block_passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from unsloth.core.errors import ModelError
from unsloth.kernels.causal_attention import Attended
from unsloth.kernels.lora_linear import flatten_adapters
from unsloth.kernels.lora_mlp import finish_gradients
from unsloth.layers import block_graphs
from unsloth.layers.block_graphs import Captured
from unsloth.layers.block_passes import Parts, Rest, backward_pass, forward_pass
from unsloth.memory.budget import Place
from unsloth.memory.offload import Parcel


@dataclass(slots=True, weakref_slot=True)
class _Kept:
    """Between forward and backward.

    Attributes:
        x: (M, K), or None while it is on the host.
        version: Of ``x``, as torch counts changes in place.
        attended: o (empty while it is on the host) with its log-sum-exp.
        t_d: (M, columns) of the down projection.
        rest: If it was kept.
        parcel: What is on the host.
        captured: Graphs to replay, if the forward was a replay.
    """

    x: torch.Tensor | None
    version: int
    attended: Attended
    t_d: torch.Tensor
    rest: Rest | None
    parcel: Parcel | None
    captured: Captured | None

    def back(self) -> tuple[torch.Tensor, Attended]:
        """X and o on the device."""
        if self.parcel is not None:
            x, out = self.parcel.fetch()
            self.parcel = None
            return x, replace(self.attended, out=out)
        assert self.x is not None
        if self.x._version != self.version:
            raise ModelError("a block's input was changed in place before its backward", do="Clone it first.")
        return self.x, self.attended


class _WholeBlock(torch.autograd.Function):
    """(x, parts, scales, a_0, b_0, a_1, ..., and the block's own weights if they are trained) to y."""

    @staticmethod
    def forward(ctx, x, parts, scales, *weights):
        """See the module."""
        ctx.parts, ctx.pairs, ctx.shape = parts, weights[: 2 * len(scales)], x.shape
        flat, needs = x.detach().view(-1, x.shape[-1]), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        with torch.autocast(x.device.type, enabled=False):
            y, ctx.kept = _forward(parts, flat, x.shape, needs)
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of x, of every A and B, and of the block's own weights."""
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise ModelError(
                "a second backward through a block whose kept values are gone",
                do="Compute the forward again, or undo the plan (model.unsloth_plan.undo()).",
            )
        flat = grad.reshape(-1, grad.shape[-1]).contiguous()
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        x, attended = kept.back()
        with torch.autocast(grad.device.type, enabled=False):
            if kept.captured is not None:
                dx, found = kept.captured.backward(ctx.parts, x, attended, kept.t_d, flat)
            else:
                rest, kept.rest = kept.rest, None
                own = ctx.parts.own(needs[1:])
                dx, raw = backward_pass(ctx.parts, x, attended, kept.t_d, rest, flat, needs, ctx.shape, own=own)
                found = finish_gradients(raw, ctx.pairs, needs[1 : 1 + len(ctx.pairs)])
                found += own.finished() if own is not None else []
        return None if dx is None else dx.view(ctx.shape), None, None, *found


def whole_block(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The block's output (B, T, K) for x of that shape, contiguous, in the dtype of the products."""
    pairs, scales = flatten_adapters([linear.adapter for linear in parts.linears()])
    return _WholeBlock.apply(x, parts, scales, *pairs, *(parts.weights() if parts.trained else ()))


def read_only(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As :func:`whole_block`, where nobody will ask for a backward."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.view(-1, x.shape[-1])
        reading = block_graphs.find_reading(parts, flat, x.shape)
        if reading is not None:
            return reading.forward(parts, flat).view(x.shape)
        if parts.number == 0:
            parts.keeper.make_way(x.device)
        return forward_pass(parts, flat, x.shape, keep=False)[0].view(x.shape)


def _forward(parts: Parts, x: torch.Tensor, shape: torch.Size, needs: tuple[bool, ...]) -> tuple[torch.Tensor, _Kept]:
    place, rest = parts.decision.place, None
    captured = block_graphs.find(parts, x, shape, needs)
    if captured is not None:
        y, x, attended, t_d = captured.forward(parts, x)
    else:
        y, attended, t_d, rest = forward_pass(parts, x, shape, keep=place is Place.KEEP)
    if place is Place.OFFLOAD:
        parcel = parts.keeper.send([x, attended.out])
        if parcel is not None:
            away = replace(attended, out=x.new_empty(0))
            return y, _Kept(None, x._version, away, t_d, None, parcel, captured)
    kept = _Kept(x, x._version, attended, t_d, rest, None, captured)
    if captured is not None:
        captured.lend(kept)
    return y, kept
