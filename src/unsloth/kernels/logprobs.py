"""Log-probability of every label, and the entropy of every distribution, without whole logits.

Shapes: hidden states (N, H), head weight (V, H), bias (V,), labels (N,) already shifted. With the transformed logits
``z``, ``lse`` and the entropy of :mod:`unsloth.kernels.softmax_rows`::

    logprob_t = z_y - lse                 entropy_t = lse - sum_v p_v z_v
    dhidden_t = up_t * U_t                U = (d logprob / d logits) @ weight

U does not depend on the incoming gradient ``up``, so with a frozen head it is computed in the forward and the backward
is one multiplication: two products in all. A trained head, or an entropy that is differentiated, needs the chunks of
logits again in the backward: three products, and one more for the weight's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from unsloth.kernels.head_chunks import (
    CHUNK_BYTES,
    TRAINED_CHUNK_BYTES,
    HeadChunks,
    flatten_head_inputs,
    matmul_into,
    product_dtype,
    statistics_dtype,
)
from unsloth.kernels.softmax_rows import (
    HeadOptions,
    RowStatistics,
    softmax_rows,
    softmax_rows_backward,
    softmax_rows_reference,
)


class TokenLogprobs(NamedTuple):
    """One value a token, in the shape of the labels; zeros (False) where the label is ignored.

    Attributes:
        logprobs: Log-probability of the label, float32.
        entropy: Entropy of the distribution, float32; None unless asked for.
        top1: Whether the label is the most probable entry.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    top1: torch.Tensor


def logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    options: HeadOptions | None = None,
    entropy: bool = False,
) -> TokenLogprobs:
    """The values with whole logits, at the inputs' dtype, in plain torch."""
    flat, flat_labels = flatten_head_inputs(hidden, weight, labels, bias)
    dtype = product_dtype(hidden, weight)
    logits = torch.nn.functional.linear(flat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    rows = softmax_rows_reference(logits, flat_labels, _plain(options), entropy)
    spread = None if rows.entropy is None else rows.entropy.view(labels.shape)
    return TokenLogprobs((-rows.loss).view(labels.shape), spread, rows.top1.view(labels.shape))


class _FrozenHead(torch.autograd.Function):
    """(logprobs, entropy, top1) with only the hidden states' gradient of the log-probabilities, made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, dtype, entropy, needs_grad, chunk_bytes):
        """See the module."""
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = hidden.to(dtype), weight.to(dtype)
            unit = torch.empty_like(x) if needs_grad else None
            stats = _statistics(HeadChunks(x, w, bias, chunk_bytes), labels, options, entropy, unit)
        ctx.save_for_backward(unit)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(stats.top1, *([] if stats.entropy is None else [stats.entropy]))
        return stats.loss.neg_(), stats.entropy, stats.top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, up, _up_entropy, _up_top1):
        """Row t of the stored gradient, which is that of the loss, times -up_t."""
        (unit,) = ctx.saved_tensors
        return (unit * up.neg()[:, None]).to(ctx.dtype), *[None] * 8


class _TrainedHead(torch.autograd.Function):
    """(logprobs, entropy, top1), every gradient, by computing the logits again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, dtype, entropy, needs_grad, chunk_bytes):
        """See the module."""
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = HeadChunks(hidden.to(dtype), weight.to(dtype), bias, chunk_bytes)
            stats = _statistics(chunks, labels, options, entropy, None)
        ctx.save_for_backward(hidden, weight, bias, labels, stats.lse, stats.entropy)
        ctx.options, ctx.dtype, ctx.chunk_bytes = options, dtype, chunk_bytes
        ctx.mark_non_differentiable(stats.top1)
        ctx.set_materialize_grads(False)
        return stats.loss.neg_(), stats.entropy, stats.top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, up, up_entropy, _up_top1):
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        stats = RowStatistics(lse, lse, entropy, lse)
        up = torch.zeros_like(lse) if up is None else up
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = HeadChunks(hidden.to(ctx.dtype), weight.to(ctx.dtype), bias, ctx.chunk_bytes)
            grads = _gradients(chunks, labels, stats, ctx.options, up, up_entropy, ctx.needs_input_grad)
        inputs = (hidden, weight, bias)
        cast = [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        return *cast, *[None] * 6


def _statistics(
    chunks: HeadChunks, labels: torch.Tensor, options: HeadOptions, entropy: bool, unit: torch.Tensor | None
) -> RowStatistics:
    """Statistics of all rows; the loss's gradient of the hidden states into ``unit`` where given."""
    parts = []
    for rows in chunks.slices():
        logits = chunks.logits(rows)
        grad = None if unit is None else chunks.gradient(logits)
        parts.append(softmax_rows(logits, labels[rows], options, grad=grad, entropy=entropy))
        if unit is not None:
            matmul_into(unit[rows], grad, chunks.weight)
    if not parts:
        empty = torch.empty(0, dtype=statistics_dtype(chunks.hidden), device=labels.device)
        return RowStatistics(empty, empty.clone(), empty.clone() if entropy else None, empty.bool())
    return RowStatistics(
        torch.cat([part.loss for part in parts]),
        torch.cat([part.lse for part in parts]),
        torch.cat([part.entropy for part in parts]) if entropy else None,
        torch.cat([part.top1 for part in parts]),
    )


def _gradients(
    chunks: HeadChunks,
    labels: torch.Tensor,
    stats: RowStatistics,
    options: HeadOptions,
    up: torch.Tensor,
    up_entropy: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Gradients of hidden states, weight and bias for the given upstream gradients, one chunk at a time."""
    x, w, wide = chunks.hidden, chunks.weight, statistics_dtype(chunks.hidden)
    grad_hidden = torch.empty_like(x) if needs[0] else None
    grad_weight = torch.zeros(w.shape, dtype=wide, device=x.device) if needs[1] else None
    grad_bias = torch.zeros(w.shape[:1], dtype=wide, device=x.device) if needs[2] else None
    up = up.contiguous()
    up_entropy = None if stats.entropy is None or up_entropy is None else up_entropy.contiguous()
    for rows in chunks.slices():
        logits = chunks.logits(rows)
        grad = logits if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
        part = RowStatistics(
            stats.lse[rows], stats.lse[rows], None if up_entropy is None else stats.entropy[rows], stats.top1[rows]
        )
        spread = None if up_entropy is None else up_entropy[rows]
        softmax_rows_backward(logits, labels[rows], part, options, up[rows], spread, grad)
        if grad_hidden is not None:
            matmul_into(grad_hidden[rows], grad, w)
        if grad_weight is not None:
            matmul_into(grad_weight, grad.t(), x[rows], accumulate=True)
        if grad_bias is not None:
            grad_bias += grad.sum(dim=0, dtype=wide)
    return [grad_hidden, grad_weight, grad_bias]


def _plain(options: HeadOptions | None) -> HeadOptions:
    """The options without label smoothing and z-loss, which are parts of a loss, not of a probability."""
    if options is None:
        return HeadOptions()
    return HeadOptions(options.logit_scale, options.softcap, options.temperature, ignore_index=options.ignore_index)


def logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    options: HeadOptions | None = None,
    entropy: bool = False,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
    fast: bool = True,
) -> TokenLogprobs:
    """Log-probability of every label under ``hidden @ weight.T + bias``, and on request the entropy.

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) head weight.
        labels: (...) integer labels, already shifted; ignored ones give zeros, other labels outside the vocabulary
            give NaN.
        bias: (V,) or None.
        options: Scale, soft cap, temperature and the ignored label; smoothing and z-loss are not used.
        entropy: Whether to return the entropy.
        entropy_grad: Whether the entropy is differentiated too; without it the entropy is a constant.
        chunk_bytes: Bound on the buffer of logits; None for the default.
        fast: False for the plain computation with whole logits.

    Returns:
        :class:`TokenLogprobs`, differentiable with respect to hidden states, weight and bias.
    """
    entropy = entropy or entropy_grad
    if not fast:
        plain = logprobs_reference(hidden, weight, labels, bias, options=options, entropy=entropy)
        return plain._replace(entropy=plain.entropy.detach()) if entropy and not entropy_grad else plain
    flat, flat_labels = flatten_head_inputs(hidden, weight, labels, bias)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    enabled = torch.is_grad_enabled()
    trained = enabled and any(t is not None and t.requires_grad for t in (weight, bias))
    function = _TrainedHead if trained or (enabled and entropy_grad) else _FrozenHead
    if chunk_bytes is None:
        chunk_bytes = TRAINED_CHUNK_BYTES if trained else CHUNK_BYTES
    needs_grad = enabled and flat.requires_grad
    dtype = product_dtype(hidden, weight)
    values, spread, top1 = function.apply(
        flat, weight, bias, flat_labels, _plain(options), dtype, entropy, needs_grad, chunk_bytes
    )
    shape = labels.shape
    if spread is not None and not entropy_grad:
        spread = spread.detach()
    return TokenLogprobs(values.view(shape), None if spread is None else spread.view(shape), top1.view(shape))
