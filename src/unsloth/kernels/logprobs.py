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

from functools import partial
from typing import NamedTuple

import torch

from unsloth.kernels.head_chunks import (
    CHUNK_BYTES,
    TRAINED_CHUNK_BYTES,
    HeadChunks,
    HeadGradients,
    flatten_head_inputs,
    matmul_into,
    product_dtype,
    statistics_dtype,
    whole_logits,
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
        # into the result, since the product of 16 and 32 bits would be one of 32 bits, twice as large, first
        return torch.mul(unit, up.neg()[:, None], out=torch.empty_like(unit, dtype=ctx.dtype)), *[None] * 8


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
    x, grads = chunks.hidden, HeadGradients(chunks, needs)
    up = up.contiguous()
    up_entropy = None if stats.entropy is None or up_entropy is None else up_entropy.contiguous()
    for rows in chunks.slices():
        logits = chunks.logits(rows)
        grad = logits if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
        entropy, spread = (None if x is None or up_entropy is None else x[rows] for x in (stats.entropy, up_entropy))
        part = RowStatistics(stats.lse[rows], stats.lse[rows], entropy, stats.top1[rows])
        softmax_rows_backward(logits, labels[rows], part, options, up[rows], spread, grad)
        grads.add(rows, grad)
    return grads.parts()


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
    entropy, options = entropy or entropy_grad, (options or HeadOptions()).plain()
    if not fast:
        rows = softmax_rows_reference(*whole_logits(hidden, weight, labels, bias), options, entropy)
        return _shaped(rows.loss.neg(), rows.entropy, rows.top1, labels.shape, entropy_grad)
    flat, flat_labels = flatten_head_inputs(hidden, weight, labels, bias)
    enabled = torch.is_grad_enabled()
    trained = enabled and any(t is not None and t.requires_grad for t in (weight, bias))
    function = _TrainedHead if trained or (enabled and entropy_grad) else _FrozenHead
    if chunk_bytes is None:
        chunk_bytes = TRAINED_CHUNK_BYTES if trained else CHUNK_BYTES
    needs_grad = enabled and flat.requires_grad
    dtype = product_dtype(hidden, weight)
    values, spread, top1 = function.apply(
        flat, weight, bias, flat_labels, options, dtype, entropy, needs_grad, chunk_bytes
    )
    return _shaped(values, spread, top1, labels.shape, entropy_grad)


logprobs_reference = partial(logprobs, fast=False)


def _shaped(
    values: torch.Tensor, entropy: torch.Tensor | None, top1: torch.Tensor, shape: torch.Size, entropy_grad: bool
) -> TokenLogprobs:
    """The result in the shape of the labels, the entropy a constant unless it is differentiated."""
    if entropy is not None:
        entropy = (entropy if entropy_grad else entropy.detach()).view(shape)
    return TokenLogprobs(values.view(shape), entropy, top1.view(shape))
