"""Cross-entropy of a language model's head without its logits: product, loss and gradient, a chunk of tokens at a time.

Shapes: hidden states (N, H), head weight (V, H), bias (V,), labels (N,) already shifted. With the row loss of
:mod:`unsloth.kernels.softmax_rows`::

    logits = hidden @ weight.T + bias
    loss   = sum over tokens of row_loss(logits, label) / num_items        (num_items: by default the labels that count)

    dhidden = G @ weight / num_items      dweight = G.T @ hidden / num_items      dbias = sum_N G / num_items

where G is the gradient of the row losses. G does not depend on the incoming gradient, which is one number, so all of
it is computed in the forward: two products (three with a trained head) instead of three (four) with recomputation, and
only R rows of logits exist at any time. Computing gradients in the forward is described by Hsu et al. 2024
(arXiv:2410.10989), chunking over the vocabulary by Wijmans et al. 2024 (arXiv:2411.09009).

The weight's gradient, summed over chunks, is held in float32, twice the size of a 16-bit weight. Where that is too much
it waits for the backward, which has all rows of a slice of the vocabulary at once: their logits are computed again, and
the slice of the gradient is one product, rounded once.

FLOPs: 4 N H V for the hidden gradient, 6 N H V with a trained head, 8 N H V if its gradient waits. Bytes beside the
products: 12 N V or so.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from unsloth.kernels import dispatch
from unsloth.kernels.head_chunks import (
    CHUNK_BYTES,
    COLUMN_STEP,
    TRAINED_CHUNK_BYTES,
    HeadChunks,
    HeadColumns,
    HeadGradients,
    flatten_head_inputs,
    matmul_into,
    product_dtype,
    statistics_dtype,
    whole_logits,
)
from unsloth.kernels.softmax_rows import HeadOptions, softmax_columns_gradient, softmax_rows, softmax_rows_reference

_LATE_SHARE = 4
"""Fewer logits exist at a time in the backward, where the weight's gradient is there, too."""


class CountedLoss(NamedTuple):
    """A loss, and how many of the labels that count are the likeliest entry of their row (int64, no gradient)."""

    loss: torch.Tensor
    correct: torch.Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the row losses; gradients of everything that needs one are computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, dtype, needs, chunk_bytes):
        """See the module; ``needs`` says which of hidden, weight, bias want a gradient."""
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = HeadChunks(hidden.to(dtype), weight.to(dtype), bias, chunk_bytes)
            total, correct, grads, _ = _loss_and_gradients(chunks, labels, options, needs)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return total, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _):
        """The stored gradients times the incoming number."""
        grads = [_times(g, grad_total, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None, None


class _LateWeight(torch.autograd.Function):
    """The same, but that gradients of weight and bias are made in the backward, a slice of the vocabulary at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, dtype, needs, chunk_bytes):
        """As above."""
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = HeadChunks(hidden.to(dtype), weight.to(dtype), bias, chunk_bytes)
            total, correct, grads, lse = _loss_and_gradients(chunks, labels, options, (needs[0], False, False))
        ctx.save_for_backward(grads[0], hidden, weight, bias, labels, lse)
        ctx.mark_non_differentiable(correct)
        ctx.options, ctx.dtype, ctx.chunk_bytes = options, dtype, chunk_bytes
        return total, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _):
        """The hidden states' gradient times the incoming number, which the others are made with."""
        grad, hidden, weight, bias, labels, lse = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        up = grad_total.neg().to(lse.dtype).expand_as(lse).contiguous()  # the loss falls with the log-probability
        with torch.autocast(hidden.device.type, enabled=False):
            columns = HeadColumns(hidden.to(ctx.dtype), weight, bias, ctx.chunk_bytes // _LATE_SHARE)
            for part in columns.slices():
                logits, slope = columns.logits(part)
                softmax_columns_gradient(logits, labels, lse, ctx.options, up, part.start, slope)
                if of_weight is not None:
                    matmul_into(of_weight[part], slope.t(), columns.hidden)
                if of_bias is not None:
                    of_bias[part] = slope.sum(0, dtype=lse.dtype)
        return _times(grad, grad_total, hidden.dtype), of_weight, of_bias, None, None, None, None, None


def late_bytes(rows: int, itemsize: int, chunk_bytes: int) -> int:
    """Bytes beside the gradient of a weight that waits for the backward: logits of ``rows``, and their gradient."""
    logits = max(chunk_bytes // _LATE_SHARE, 4 * rows * COLUMN_STEP)
    return logits + logits * itemsize // 4 if itemsize < 4 else logits


def _times(grad: torch.Tensor | None, number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """``grad`` times ``number``, rounded once, without a float32 copy of the weight's gradient."""
    if grad is None:
        return None
    return torch.mul(grad, number.to(grad.dtype), out=torch.empty_like(grad, dtype=dtype))


def _loss_and_gradients(
    chunks: HeadChunks, labels: torch.Tensor, options: HeadOptions, needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
    """The summed loss, the hits, the gradients of hidden (dtype of the product), weight and bias (float32), and lse.

    lse (N,) is NaN in rows whose label does not exist.
    """
    total = torch.zeros((), dtype=statistics_dtype(chunks.hidden), device=labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    lse = torch.empty(labels.shape, dtype=total.dtype, device=labels.device)
    grads = HeadGradients(chunks, needs)
    for rows in chunks.slices():
        logits = chunks.logits(rows)
        grad = chunks.gradient(logits) if any(needs) else None
        statistics = softmax_rows(logits, labels[rows], options, grad=grad)
        total += statistics.loss.sum()
        correct += statistics.top1.sum()
        torch.add(statistics.lse, statistics.loss, alpha=0, out=lse[rows])
        if grad is not None:
            grads.add(rows, grad)
    return total, correct, grads.parts(), lse


def _items(
    labels: torch.Tensor, options: HeadOptions, num_items: int | float | torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | int | float:
    """The divisor; counting labels stays on the device, and no label that counts gives a loss of 0."""
    if num_items is None:
        return (labels != options.ignore_index).sum().clamp(min=1).to(dtype)
    return num_items.to(labels.device, dtype) if isinstance(num_items, torch.Tensor) else num_items


def counted_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    options: HeadOptions | None = None,
    num_items: int | float | torch.Tensor | None = None,
    drop_ignored: bool = False,
    chunk_bytes: int | None = None,
    late_weight: bool = False,
    fast: bool = True,
) -> CountedLoss:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels``.

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) head weight; its gradient is computed only if it requires one, summed in float32.
        labels: (...) integer labels, already shifted; ``options.ignore_index`` marks those that do not count, any
            other label outside the vocabulary makes the loss NaN.
        bias: (V,) or None.
        options: Scale, soft cap, temperature, label smoothing, z-loss and the ignored label.
        num_items: Divides the sum; None for the number of labels that count (1 if there are none).
        drop_ignored: Leave ignored rows out of the products, for the price of waiting for the device once.
        chunk_bytes: Bound on the buffer of logits; None for the default.
        late_weight: Whether the weight's gradient waits for the backward, for less memory and a product more. Not in
            float16, whose range is too small for it, nor with label smoothing or z-loss.
        fast: False for the plain computation with whole logits.

    Returns:
        The loss, a float32 number (float64 for float64 inputs), and how many labels that count are the likeliest entry.
    """
    options = options or HeadOptions()
    if not fast:
        logits, flat_labels = whole_logits(hidden, weight, labels, bias)
        rows = softmax_rows_reference(logits, flat_labels, options)
        return CountedLoss(rows.loss.sum() / _items(flat_labels, options, num_items, rows.loss.dtype), rows.top1.sum())
    flat, flat_labels = flatten_head_inputs(hidden, weight, labels, bias)
    if drop_ignored:
        kept = (flat_labels != options.ignore_index).nonzero()[:, 0]
        flat, flat_labels = flat.index_select(0, kept), flat_labels.index_select(0, kept)
    enabled = torch.is_grad_enabled()
    needs = tuple(enabled and t is not None and t.requires_grad for t in (flat, weight, bias))
    dtype = product_dtype(hidden, weight)
    if dtype != torch.float64 and flat.device.type == "cpu" and not dispatch.interpreting():
        dtype = torch.float32  # few CPUs multiply 16-bit numbers; torch's product takes minutes on the others
    late = late_weight and any(needs[1:]) and options.can_wait and torch.float16 not in (dtype, weight.dtype)
    if chunk_bytes is None:
        chunk_bytes = TRAINED_CHUNK_BYTES if needs[1] and not late else CHUNK_BYTES
    function = _LateWeight if late else _LinearCrossEntropy
    total, correct = function.apply(flat, weight, bias, flat_labels, options, dtype, needs, chunk_bytes)
    return CountedLoss(total / _items(flat_labels, options, num_items, total.dtype), correct)


def linear_cross_entropy(*inputs: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    """The loss alone; everything else as for :func:`counted_linear_cross_entropy`."""
    return counted_linear_cross_entropy(*inputs, **settings).loss


linear_cross_entropy_reference = partial(linear_cross_entropy, fast=False)
