"""Linear layers with low-rank adapters: one, or several that share their input (q/k/v, gate/up).

Shapes: x (M, K), weights (out_i, K) frozen, adapters A_i (r_i, K), B_i (out_i, r_i), scale s_i (Hu et al. 2021,
arXiv:2106.09685)::

    t_i = x A_i^T                    y_i = x W_i^T + s_i t_i B_i^T + bias_i
    p_i = s_i g_i B_i                dx  = sum_i g_i W_i + p_i A_i
    dA_i = p_i^T x                   dB_i = s_i g_i^T t_i

Products: with padded weights (:mod:`unsloth.kernels.lora_weights`) one for all outputs and one for the input gradient,
one operation for all dA and dB; the thin products t and p are made while x and g are copied next to them. Saved for
the backward: x and t. Adapters stay float32 masters: they are cast as they are placed, and their gradients leave the
products' accumulators as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.adapter_products import adapter_products
from unsloth.kernels.append_projection import append_projection, append_projections, matmul_wide
from unsloth.kernels.dispatch import check_tensors
from unsloth.kernels.lora_weights import Adapter, LoraGroup, PaddedWeight, Weight


def lora_linears_reference(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: Sequence[Adapter | None],
    biases: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The formula in plain torch, at the dtype of ``x`` (autocast's where that is on)."""
    dtype = product_dtype(x)
    x = x.to(dtype)
    outputs = []
    dense = dense_weights(weights)
    for weight, adapter, bias in zip(dense, adapters, biases or [None] * len(adapters), strict=True):
        y = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if adapter is not None:
            y = y + (x @ adapter.a.to(dtype).t()) @ adapter.b.to(dtype).t() * adapter.scale
        outputs.append(y)
    return tuple(outputs)


class _LoraLinears(torch.autograd.Function):
    """(x, buffer, weights, biases, scales, dtype, a_0, b_0, a_1, ...) to one output a linear."""

    @staticmethod
    def forward(ctx, x, buffer, weights, biases, scales, dtype, *pairs):
        """See the module."""
        adapters = gather_adapters(pairs, scales)
        with torch.autocast(x.device.type, enabled=False):
            group = LoraGroup(weights, adapters, dtype)
            check_input(x, group.in_features)
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            wide, projected, kept = project_input(flat, group, buffer)
            y = group.forward(wide, projected, biases)
        ctx.save_for_backward(unshared(flat, buffer), kept, *pairs)
        ctx.group = None if any(callable(weight) for weight in weights) else group
        ctx.weights, ctx.scales, ctx.dtype, ctx.shape, ctx.x_dtype = weights, scales, dtype, x.shape, x.dtype
        return tuple(alias(y[:, columns], x.shape[:-1]) for columns in group.out_slices())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        """Gradients of x and of every A and B."""
        x, projected, *pairs = ctx.saved_tensors
        needs_x, needs_pairs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        with torch.autocast(x.device.type, enabled=False):
            if ctx.group is None:
                group = LoraGroup(ctx.weights, gather_adapters(pairs, ctx.scales), ctx.dtype, again=False)
            else:
                group = ctx.group.refreshed()
            flat = [g.to(ctx.dtype).reshape(x.shape[0], g.shape[-1]) for g in grads]
            g, g_projected = project_gradients(flat, group)
            dx = group.input_gradient(g, g_projected) if needs_x else None
            pair_grads = adapter_gradients(group, x, projected, g, g_projected, needs_pairs)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return (
            dx,
            *[None] * 5,
            *[None if d is None else d.to(p.dtype) for d, p in zip(pair_grads, pairs, strict=True)],
        )


def project_input(
    x: torch.Tensor, group: LoraGroup, buffer: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x with ``room`` columns appended, x A^T, the same for the backward, in memory of its own).

    The second is the appended part, where there is room. ``buffer`` is used in place of a copy of x where x is its
    first columns and the rest has the right width.
    """
    if not group.room:
        projected = x @ group.a.t()
        return x, projected, projected
    features = x.shape[1]
    if buffer is not None and _holds(buffer, x, features + group.room):
        tail = buffer[:, features:]
        append_projection(x, group.a.t(), tail)
        return buffer, tail, tail.clone()
    wide = torch.empty(x.shape[0], features + group.room, dtype=x.dtype, device=x.device)
    tail = wide[:, features:]
    kept = torch.empty_like(tail, memory_format=torch.contiguous_format)
    append_projection(x, group.a.t(), tail, copy=wide[:, :features], kept=kept)
    return wide, tail, kept


def _holds(buffer: torch.Tensor, x: torch.Tensor, width: int) -> bool:
    """Whether ``x`` is the first columns of a ``buffer`` of ``width`` columns."""
    same_start = buffer.data_ptr() == x.data_ptr() and buffer.dtype == x.dtype and x.numel() > 0
    return same_start and buffer.shape == (x.shape[0], width) and buffer.stride() == x.stride() and x.stride(1) == 1


def project_gradients(grads: Sequence[torch.Tensor], group: LoraGroup) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """(what :meth:`LoraGroup.input_gradient` takes, g sB): the second is a part of the first, where there is room."""
    rows, total, used = grads[0].shape[0], sum(group.outs), sum(group.ranks)
    if group.room:
        wide = torch.empty(rows, total + group.room, dtype=grads[0].dtype, device=grads[0].device)
        if used < group.columns:
            wide[:, total + used :].zero_()
        append_projections(grads, group.stacked_sb(), group.ranks, wide)
        return [wide], wide[:, total:]
    tail = torch.empty(rows, group.columns, dtype=grads[0].dtype, device=grads[0].device)
    for i, (g, ranks) in enumerate(zip(grads, group.rank_slices(), strict=True)):
        if group.ranks[i]:
            torch.mm(g, group.sb(i, g.dtype), out=tail[:, ranks])
    return grads, tail


def adapter_gradients(
    group: LoraGroup,
    x: torch.Tensor,
    projected: torch.Tensor,
    grads: Sequence[torch.Tensor],
    g_projected: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """dA_0, dB_0, dA_1, ... in float32 (None where not needed), the dA in one product.

    In the padded form all of them are one operation. Where not all are needed, the dB are one product whose blocks off
    the diagonal are not used: reading g once counts more.
    """
    if group.room and all(needs) and 0 not in group.ranks:
        g = grads[0][:, : sum(group.outs)]
        scales = [1.0 if adapter is None else adapter.scale for adapter in group.adapters]
        da, db = adapter_products(x, g_projected, g, projected, group.outs, group.ranks, scales)
        return [d for ranks, b in zip(group.rank_slices(), db, strict=True) for d in (da[ranks], b)]
    all_a = matmul_wide(g_projected.t(), x) if any(needs[::2]) else None
    all_b = matmul_wide(grads[0][:, : sum(group.outs)].t(), projected) if group.room and any(needs[1::2]) else None
    found: list[torch.Tensor | None] = []
    for i, (columns, ranks) in enumerate(zip(group.out_slices(), group.rank_slices(), strict=True)):
        adapter = group.adapters[i]
        found.append(all_a[ranks] if all_a is not None and adapter is not None and needs[2 * i] else None)
        if adapter is None or not needs[2 * i + 1]:
            found.append(None)
            continue
        db = matmul_wide(grads[i].t(), projected[:, ranks]) if all_b is None else all_b[columns, ranks]
        found.append(db * adapter.scale)
    return found


def alias(columns: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """(M, out) columns as (*batch, out) in the same memory, no view to autograd, so that it may be changed in place."""
    shaped = columns.view(*batch, columns.shape[1])
    fresh = torch.empty(0, dtype=columns.dtype, device=columns.device)
    return fresh.set_(columns.untyped_storage(), columns.storage_offset(), shaped.shape, shaped.stride())


def unshared(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """``x`` as it is saved for the backward: of a buffer, an alias that the writes beside it do not invalidate."""
    return x if buffer is None else alias(x, x.shape[:1])


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_input(x: torch.Tensor, in_features: int) -> None:
    """Raise unless the last dimension of ``x`` is ``in_features``."""
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ConfigError(
            "The input does not fit the weight", got=(tuple(x.shape), in_features), do="Pass x of shape (..., in)."
        )


def check_linears(
    op: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: Sequence[Adapter | None],
    features: int,
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Raise unless what is known of the weights (functions are not called) and adapters fits inputs like ``x``.

    Args:
        op: Name of the operation, for messages.
        x: Says the device, and must be floating point.
        weights: Of one input.
        adapters: One a linear, or None.
        features: Columns that each weight has.
        biases: One a linear, or None; or none at all.
    """
    check_tensors(op, x=x)
    plain = [w for w in weights if isinstance(w, torch.Tensor)]
    for i, weight in enumerate(plain):
        check_tensors(op, **{"x": x, f"weight {i}": weight})
        if weight.dim() != 2 or weight.shape[1] != features:
            do = f"Pass matrices (out, {features})."
            raise ConfigError(f"{op}: weight {i} does not fit the input", got=tuple(weight.shape), do=do)
    outs = [w.shape[0] for w in plain] if len(plain) == len(adapters) else [None] * len(adapters)
    for i, bias in enumerate(biases):
        check_tensors(op, **{"x": x, f"bias {i}": bias})
        if bias is not None and (bias.dim() != 1 or (outs[i] is not None and outs[i] != len(bias))):
            do = f"Pass a bias ({outs[i] or 'out'},)."
            raise ConfigError(f"{op}: bias {i} does not fit its linear", got=tuple(bias.shape), do=do)
    for i, (adapter, out) in enumerate(zip(adapters, outs, strict=True)):
        if adapter is None:
            continue
        check_tensors(op, **{"x": x, f"a of adapter {i}": adapter.a, f"b of adapter {i}": adapter.b})
        a, b = tuple(adapter.a.shape), tuple(adapter.b.shape)
        if len(a) != 2 or len(b) != 2 or a[1] != features or b[1] != a[0] or out not in (None, b[0]):
            do = f"Pass A (r, {features}) and B ({out or 'out'}, r)."
            raise ConfigError(f"{op}: adapter {i} does not fit its linear", got=(a, b), do=do)


def dense_weights(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """One (out_i, K) tensor a linear, from any form."""
    dense: list[torch.Tensor] = []
    for weight in weights:
        got = weight() if callable(weight) else weight
        dense += got.parts() if isinstance(got, PaddedWeight) else [got]
    return dense


def gather_adapters(pairs: Sequence[torch.Tensor | None], scales: Sequence[float]) -> list[Adapter | None]:
    """The inverse of :func:`flatten_adapters`."""
    found: list[Adapter | None] = []
    for a, b, scale in zip(pairs[::2], pairs[1::2], scales, strict=True):
        found.append(None if a is None or b is None else Adapter(a, b, scale))
    return found


def must_use_reference(weights: Sequence[Weight], biases: Sequence[torch.Tensor | None]) -> bool:
    """Whether something that these ops hold frozen wants a gradient."""
    tensors = [w for w in weights if isinstance(w, torch.Tensor)] + [b for b in biases if b is not None]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def flatten_adapters(adapters: Sequence[Adapter | None]) -> tuple[list[torch.Tensor | None], list[float]]:
    """(a_0, b_0, a_1, ...), scales."""
    pairs: list[torch.Tensor | None] = []
    for adapter in adapters:
        pairs += [None, None] if adapter is None else [adapter.a, adapter.b]
    return pairs, [1.0 if adapter is None else adapter.scale for adapter in adapters]


def lora_linears(
    x: torch.Tensor,
    weights: Sequence[Weight] | PaddedWeight,
    adapters: Sequence[Adapter | None],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    buffer: torch.Tensor | None = None,
    fast: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Linears of one input, each with an adapter or None.

    Args:
        x: (..., K).
        weights: (out_i, K) tensors, or functions that yield them; or one :class:`PaddedWeight` (or one function that
            yields it) that holds all of them. Functions are called again in the backward, so that a dequantized
            weight need not be kept.
        adapters: One a linear, in any float dtype; gradients have the dtype of the adapter.
        biases: One (out_i,) or None a linear.
        buffer: (M, K + padded rank) whose first columns are x, for instance because a norm has written it there:
            the rest is overwritten, and the copy of x is saved. Used with a PaddedWeight only.
        fast: False for the plain computation.

    Returns:
        One (..., out_i) a linear; with a PaddedWeight they lie side by side in one buffer.
    """
    weights = [weights] if isinstance(weights, PaddedWeight) or callable(weights) else list(weights)
    biases = list(biases) if biases is not None else [None] * len(adapters)
    if x.dim():
        check_linears("lora_linears", x, weights, adapters, x.shape[-1], biases)
    if not fast or must_use_reference(weights, biases):
        return lora_linears_reference(x, weights, adapters, biases)
    pairs, scales = flatten_adapters(adapters)
    biases = [None if bias is None else bias.detach() for bias in biases]
    buffer = None if buffer is None else buffer.detach()
    return _LoraLinears.apply(x, buffer, weights, biases, scales, product_dtype(x), *pairs)


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    adapter: Adapter | None,
    bias: torch.Tensor | None = None,
    *,
    fast: bool = True,
) -> torch.Tensor:
    """One linear: (..., K) to (..., out); see :func:`lora_linears`."""
    return lora_linears(x, [weight], [adapter], [bias], fast=fast)[0]


def lora_qkv(
    x: torch.Tensor,
    weights: Sequence[Weight] | PaddedWeight,
    adapters: Sequence[Adapter | None],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    fast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of one input; see :func:`lora_linears`."""
    q, k, v = lora_linears(x, weights, adapters, biases, fast=fast)
    return q, k, v
