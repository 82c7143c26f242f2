import pytest
import torch
from check_op import check_op
from test_linear_cross_entropy import make

from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth.kernels.logprobs import logprobs, logprobs_reference
from unsloth.kernels.softmax_rows import HeadOptions

CAPPED = HeadOptions(logit_scale=0.7, softcap=4.0, temperature=1.3)


def both(options=None, entropy=False, entropy_grad=False, **kwargs):
    """(ours, reference) as functions of tensors, without the absent entropy."""

    def ours(*tensors):
        result = logprobs(*tensors, options=options, entropy=entropy, entropy_grad=entropy_grad, **kwargs)
        return [t for t in result if t is not None]

    def reference(*tensors):
        result = logprobs_reference(*tensors, options=options, entropy=entropy, entropy_grad=entropy_grad)
        return [t for t in result if t is not None]

    return ours, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mode", ["plain", "entropy", "entropy_grad"])
def test_values_and_gradients(device, dtype, trained, mode):
    x, w, labels = make(device, 13, 24, 301, dtype, trained)
    modes = {"plain": {}, "entropy": {"entropy": True}, "entropy_grad": {"entropy_grad": True}}
    check_op(*both(CAPPED, **modes[mode]), x, w, labels)


def test_without_options_and_with_bias(device):
    x, w, labels = make(device, 7, 16, 50)
    check_op(*both(entropy_grad=True), x, w, labels, torch.randn(50, device=device).requires_grad_())


def test_several_chunks_and_tiles(device):
    check_op(*both(entropy=True, chunk_bytes=1), *make(device, 150, 8, 33, trained=False))
    check_op(*both(entropy_grad=True, chunk_bytes=1), *make(device, 150, 8, 33))
    check_op(*both(entropy_grad=True), *make(device, 2, 8, 9001))


def test_sum_is_the_cross_entropy(device):
    x, w, labels = make(device, 12, 8, 33)
    total = -logprobs(x, w, labels).logprobs.sum()
    torch.testing.assert_close(total, linear_cross_entropy(x, w, labels, num_items=1))


def test_entropy_is_a_constant_unless_asked(device):
    x, w, labels = make(device, 5, 8, 33)
    for fast in (True, False):
        assert not logprobs(x, w, labels, entropy=True, fast=fast).entropy.requires_grad
        assert logprobs(x, w, labels, entropy_grad=True, fast=fast).entropy.requires_grad


def test_shapes_empty_and_no_grad(device):
    x, w, labels = make(device, 6, 8, 33, trained=False)
    result = logprobs(x.view(2, 3, 8), w, labels.view(2, 3), entropy=True)
    assert [t.shape for t in result] == [(2, 3)] * 3
    assert result.top1.dtype == torch.bool
    empty = logprobs(x[:0], w, labels[:0], entropy=True)
    assert [t.shape for t in empty] == [(0,)] * 3
    assert torch.autograd.grad(empty.logprobs.sum(), x)[0].abs().sum() == 0
    with torch.no_grad():
        assert not logprobs(x, w, labels).logprobs.requires_grad


def test_top1(device):
    w = torch.eye(5, device=device)
    labels = torch.tensor([0, 1, 4, -100], device=device)
    x = torch.tensor([[3.0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0]], device=device)
    assert logprobs(x, w, labels).top1.tolist() == [True, False, True, False]


def test_a_bad_label_is_visible(device):
    x, w, labels = make(device, 4, 8, 33, trained=False, ignored=0)
    labels[1] = 40
    assert logprobs(x, w, labels).logprobs.isnan().tolist() == [False, True, False, False]
