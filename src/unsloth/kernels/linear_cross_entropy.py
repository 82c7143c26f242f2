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

FLOPs: 4 N H V for the hidden gradient, 6 N H V with a trained head. Bytes beside the products: 12 N V or so.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from unsloth.kernels import dispatch
from unsloth.kernels.head_chunks import (
    CHUNK_BYTES,
    TRAINED_CHUNK_BYTES,
    HeadChunks,
    HeadGradients,
    flatten_head_inputs,
    product_dtype,
    statistics_dtype,
    whole_logits,
)
from unsloth.kernels.softmax_rows import HeadOptions, softmax_rows, softmax_rows_reference


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
            total, correct, grads = _loss_and_gradients(
                hidden, weight, bias, labels, options, dtype, needs, chunk_bytes
            )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return total, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _):
        """The stored gradients times the incoming number."""
        grads: list[torch.Tensor | None] = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            scaled = None if grad is None else torch.empty_like(grad, dtype=dtype)
            if scaled is not None:  # rounded once, without a float32 copy of the weight's gradient
                torch.mul(grad, grad_total.to(grad.dtype), out=scaled)
            grads.append(scaled)
        return *grads, None, None, None, None, None


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    options: HeadOptions,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    chunk_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """The summed loss, the hits, and the gradients of hidden (dtype of the product), weight and bias (float32)."""
    chunks = HeadChunks(hidden.to(dtype), weight.to(dtype), bias, chunk_bytes)
    total = torch.zeros((), dtype=statistics_dtype(chunks.hidden), device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    grads = HeadGradients(chunks, needs)
    for rows in chunks.slices():
        logits = chunks.logits(rows)
        grad = chunks.gradient(logits) if any(needs) else None
        statistics = softmax_rows(logits, labels[rows], options, grad=grad)
        total += statistics.loss.sum()
        correct += statistics.top1.sum()
        if grad is not None:
            grads.add(rows, grad)
    return total, correct, grads.parts()


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
    if chunk_bytes is None:
        chunk_bytes = TRAINED_CHUNK_BYTES if needs[1] else CHUNK_BYTES
    dtype = product_dtype(hidden, weight)
    if dtype != torch.float64 and flat.device.type == "cpu" and not dispatch.interpreting():
        dtype = torch.float32  # few CPUs multiply 16-bit numbers; torch's product takes minutes on the others
    total, correct = _LinearCrossEntropy.apply(flat, weight, bias, flat_labels, options, dtype, needs, chunk_bytes)
    return CountedLoss(total / _items(flat_labels, options, num_items, total.dtype), correct)


def linear_cross_entropy(*inputs: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    """The loss alone; everything else as for :func:`counted_linear_cross_entropy`."""
    return counted_linear_cross_entropy(*inputs, **settings).loss


linear_cross_entropy_reference = partial(linear_cross_entropy, fast=False)
