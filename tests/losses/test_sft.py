"""The loss in chunks against transformers' own on whole logits."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from unsloth.core.errors import ConfigError, DataError
from unsloth.kernels.softmax_rows import HeadOptions
from unsloth.losses.sft import causal_lm_loss

B, T, D, V = 3, 70, 16, 91


def make(masked=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, dtype=dtype) * 0.7).requires_grad_()
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < masked] = -100
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels, options=None, **kwargs):
    options = options or HeadOptions()
    logits = torch.nn.functional.linear(hidden, weight, bias) * options.logit_scale
    if options.softcap:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    if options.label_smoothing:
        rows = logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(
            rows, labels[:, 1:].flatten(), label_smoothing=options.label_smoothing, ignore_index=options.ignore_index
        )
    return ForCausalLMLoss(logits, labels, V, ignore_index=options.ignore_index, **kwargs)


def assert_equal(found, expected, leaves):
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("chunk_bytes", [None, 1])  # one chunk, and as many as there can be
@pytest.mark.parametrize("masked", [0.0, 0.3, 0.97])
def test_equals_the_loss_of_whole_logits(masked, chunk_bytes, fast):
    hidden, weight, bias, labels = make(masked)
    found = causal_lm_loss(hidden, weight, labels, bias, chunk_bytes=chunk_bytes, fast=fast)
    assert_equal(found.loss, plain(hidden, weight, bias, labels), [hidden, weight, bias])
    predictions = torch.nn.functional.linear(hidden, weight, bias)[:, :-1].argmax(-1)
    assert found.correct == (predictions == labels[:, 1:]).sum()


@pytest.mark.parametrize(
    "options",
    [
        HeadOptions(logit_scale=0.2),
        HeadOptions(softcap=1.5),
        HeadOptions(logit_scale=3.0, softcap=2.0),
        HeadOptions(label_smoothing=0.2),
        HeadOptions(ignore_index=7),
    ],
    ids=str,
)
def test_what_happens_between_head_and_loss(options):
    hidden, weight, bias, labels = make(masked=0)
    labels[torch.rand(B, T) < 0.3] = options.ignore_index
    found = causal_lm_loss(hidden, weight, labels, bias, options=options).loss
    assert_equal(found, plain(hidden, weight, bias, labels, options), [hidden, weight, bias])


@pytest.mark.parametrize("items", [17, 17.0, torch.tensor(17)])
def test_the_number_of_items_divides(items):
    hidden, weight, bias, labels = make()
    found = causal_lm_loss(hidden, weight, labels, bias, num_items=items).loss
    assert_equal(found, plain(hidden, weight, bias, labels, num_items_in_batch=items), [hidden, weight, bias])


def test_labels_that_are_shifted_already():
    hidden, weight, bias, labels = make()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    found = causal_lm_loss(hidden, weight, shifted, bias, shifted=True).loss
    assert_equal(found, plain(hidden, weight, bias, None, shift_labels=shifted), [hidden, weight, bias])


def test_a_mask_of_the_last_turn_only_trains():
    hidden, weight, bias, labels = make(masked=0)
    labels[:, :-2] = -100
    loss = causal_lm_loss(hidden, weight, labels, bias).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    trained = gradient.abs().sum(-1) > 0
    assert trained[:, -3:-1].all()
    assert not trained[:, :-3].any() and not trained[:, -1].any()


def test_only_trained_positions_are_computed(monkeypatch):
    from unsloth.kernels import linear_cross_entropy as kernel

    rows = []
    original = kernel.softmax_rows
    monkeypatch.setattr(kernel, "softmax_rows", lambda x, *a, **k: rows.append(x.shape[0]) or original(x, *a, **k))
    hidden, weight, bias, labels = make(masked=0.9)
    causal_lm_loss(hidden, weight, labels, bias)
    assert sum(rows) == (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_nothing_to_train_on_is_zero_without_gradients(items):
    hidden, weight, bias, labels = make()
    loss = causal_lm_loss(hidden, weight, torch.full_like(labels, -100), bias, num_items=items).loss
    assert loss.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, [hidden, weight, bias]))


def test_sums_are_float32_for_16_bit_inputs():
    hidden, weight, _, labels = make(dtype=torch.bfloat16)
    found = causal_lm_loss(hidden, weight, labels).loss
    exact = plain(hidden.double(), weight.double(), None, labels)
    rounded = plain(hidden, weight, None, labels)
    assert found.dtype == torch.float32
    assert abs(found - exact) <= abs(rounded - exact) + 1e-6
    gradients = torch.autograd.grad(found, [hidden, weight])
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16]
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        assert (ours - theirs).norm() <= 2**-7 * theirs.norm()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, labels = make()
    causal_lm_loss(hidden, weight.detach(), labels).loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_wrong_inputs_are_named():
    hidden, weight, bias, labels = make()
    with pytest.raises(DataError, match="outside the model's vocabulary of 91"):
        causal_lm_loss(hidden, weight, labels.clamp(min=0) + V, bias)
    with pytest.raises(ConfigError, match="do not fit"):
        causal_lm_loss(hidden, weight[:, :-1], labels, bias)
    with pytest.raises(ConfigError, match="label"):
        causal_lm_loss(hidden, weight, labels[:, :-1], bias)
