import pytest
import torch
from check_op import check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.grouped_gemm import grouped_linear, grouped_linear_reference


def make(device, ends=(20, 20, 53, 60), features=32, out=48, rank=16, dtype=torch.float32):
    ends = torch.tensor(ends, dtype=torch.int32, device=device)
    experts = len(ends)
    x = torch.randn(int(ends[-1]), features, device=device).to(dtype).requires_grad_()
    w = (torch.randn(experts, out, features, device=device) / features**0.5).to(dtype)
    a = (torch.randn(experts, rank, features, device=device) / features**0.5).requires_grad_()
    b = (torch.randn(experts, out, rank, device=device) / rank**0.5).requires_grad_()
    return x, w, ends, a, b


def op(x, w, ends, a, b):
    return grouped_linear(x, w, ends, a, b, 2.0)


def reference(x, w, ends, a, b):
    return grouped_linear_reference(x, w, ends, a, b, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(32, 48, 16), (5, 7, 3)], ids=["aligned", "odd"])
def test_values_and_gradients(device, dtype, sizes):
    features, out, rank = sizes
    check_op(op, reference, *make(device, features=features, out=out, rank=rank, dtype=dtype))


@pytest.mark.parametrize("sizes", [(32, 48, 16), (5, 7, 3)], ids=["aligned", "odd"])
def test_bfloat16_gradients_are_rounded_once(device, sizes):
    features, out, rank = sizes
    x, w, ends, a, b = make(device, features=features, out=out, rank=rank, dtype=torch.bfloat16)
    y = op(x, w, ends, a, b)
    got = torch.autograd.grad(y.float().square().sum(), [x, a, b])
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, a, b)]
    truth = reference(wide[0], wide[1], ends, wide[2], wide[3])
    expected = torch.autograd.grad(truth.square().sum(), [wide[0], wide[2], wide[3]])
    for ours, exact in zip([y, *got], [truth, *expected], strict=True):
        assert (ours.double() - exact).norm() < 1e-2 * exact.norm()
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]


def test_without_adapter_layouts_and_only_what_is_needed(device):
    x, w, ends, a, b = make(device)
    check_op(lambda x, w, e: grouped_linear(x, w, e), lambda x, w, e: grouped_linear_reference(x, w, e), x, w, ends)
    for view in layouts(x).values():
        check_op(op, reference, view, w, ends, a, b)
    check_op(op, reference, x.detach(), w, ends.long(), a, b)
    check_op(op, reference, x, w.transpose(1, 2).contiguous().transpose(1, 2), ends, a.detach(), b)


def test_empty_experts_and_rows(device):
    check_op(op, reference, *make(device, ends=(0, 0, 9, 9)))
    check_op(op, reference, *make(device, ends=(0, 0)))


def test_trained_weights_use_the_reference(device):
    x, w, ends, a, b = make(device)
    w.requires_grad_()
    assert torch.autograd.grad(op(x, w, ends, a, b).sum(), w)[0].shape == w.shape


def test_bad_input(device):
    x, w, ends, a, b = make(device)
    with pytest.raises(ConfigError, match="do not fit"):
        grouped_linear(x[:, :5], w, ends)
    with pytest.raises(ConfigError, match="end an expert"):
        grouped_linear(x, w, ends[:2])
    with pytest.raises(ConfigError, match="A and a B"):
        grouped_linear(x, w, ends, a)
    with pytest.raises(ConfigError, match="does not fit the experts"):
        grouped_linear(x, w, ends, a, b[:, :4])
    with pytest.raises(ConfigError, match="dtype"):
        grouped_linear(x.half(), w, ends, a, b)
