"""The loss of supervised fine-tuning: mean cross-entropy of the next token, from hidden states, without logits.

Shapes: B rows, T tokens, D hidden, V vocabulary; N of the B*T positions are trained on. With the head's product r and
the options of :class:`unsloth.kernels.softmax_rows.HeadOptions` (scale, soft cap, label smoothing)::

    z_BTV = softcap * tanh(scale * r_BTV / softcap),  r_BTV = hidden_BTD @ weight_VD.T + bias_V
    loss  = sum over trained positions of (logsumexp(z) - z[label]) / num_items

The positions that are not trained on are left out before the product, whatever their share; the others go through
the head in chunks, and each chunk's gradient is made with its loss (see
:mod:`unsloth.kernels.linear_cross_entropy`). Sums are float32.
"""

from __future__ import annotations

import torch

from unsloth.core.errors import DataError
from unsloth.kernels.linear_cross_entropy import CountedLoss, counted_linear_cross_entropy
from unsloth.kernels.softmax_rows import HeadOptions

# On a CPU a small buffer of logits stays nearer to the caches and loses nothing to launches.
CPU_CHUNK_BYTES = 32 * 2**20


def next_token_labels(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels (B, T) moved one position to the left, so that position t holds the token that follows it."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    options: HeadOptions | None = None,
    num_items: int | float | torch.Tensor | None = None,
    shifted: bool = False,
    chunk_bytes: int | None = None,
    late_weight: bool = False,
    fast: bool = True,
) -> CountedLoss:
    """Mean cross-entropy of predicting each token from those before it.

    The reduction is that of ``transformers``' ``ForCausalLMLoss``, except that a batch without a single trained
    position has the loss 0 and zero gradients, where the mean of nothing would be NaN.

    Args:
        hidden: (B, T, D) last hidden states.
        weight: (V, D) of the head; gets a gradient only if it requires one.
        labels: (B, T) token ids; ``options.ignore_index`` marks positions that are not trained on.
        bias: (V,) of the head, or None.
        options: Scale, soft cap, label smoothing, and the ignored label.
        num_items: Divides the sum of the losses (Trainer's ``num_items_in_batch``); None for the number of trained
            positions of this batch.
        shifted: Whether ``labels`` already hold, at each position, the token that follows it.
        chunk_bytes: Bound on the logits that exist at a time; None for the default of the device.
        late_weight: Whether the weight's gradient waits for the backward, for less memory and a product more.
        fast: False for plain torch with whole logits, the reference.

    Returns:
        The loss (float32; float64 for float64 inputs), and how many trained positions were predicted right.

    Raises:
        ConfigError: Shapes, dtypes or devices do not fit together.
        DataError: A label lies outside the vocabulary (on the CPU; elsewhere such a label makes the loss NaN).
    """
    options = options or HeadOptions()
    labels = labels.to(hidden.device)
    if not shifted:
        labels = next_token_labels(labels, options.ignore_index)
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:
        _check_range(labels, weight.shape[0], options.ignore_index)
        chunk_bytes = chunk_bytes or CPU_CHUNK_BYTES
    return counted_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        options=options,
        num_items=_not_zero(num_items),
        drop_ignored=True,
        chunk_bytes=chunk_bytes,
        late_weight=late_weight,
        fast=fast,
    )


def _not_zero(num_items: int | float | torch.Tensor | None) -> int | float | torch.Tensor | None:
    """A divisor of 0 means that nothing is trained on: any other divisor gives the loss 0."""
    if isinstance(num_items, torch.Tensor):
        return torch.where(num_items == 0, 1, num_items)
    return 1 if num_items == 0 else num_items


def _check_range(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel():
        raise DataError(
            f"a label is outside the model's vocabulary of {vocabulary:,} entries",
            got=int(wrong[0]),
            do=f"Use token ids from 0 to {vocabulary - 1}, or {ignore_index} where nothing is trained.",
        )
