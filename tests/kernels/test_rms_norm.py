import pytest
import torch
from check_op import ODD_SHAPES, check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.rms_norm import (
    add_rms_norm,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ours(x, w, eps=1e-6, offset=0.0):
    return rms_norm(x, w, eps, offset=offset)


def add_reference(x, r, w, eps=1e-6, offset=0.0):
    h = x + r
    return rms_norm_reference(h, w, eps, offset), h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_output_and_gradients(device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    w = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    check_op(ours, rms_norm_reference, x, w, 1e-6, 0.0, names=("x", "weight"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_offset_and_float32_weight(device, dtype):
    x = (torch.randn(2, 3, 65, device=device) * 30).to(dtype).requires_grad_()
    w = torch.randn(65, device=device).requires_grad_()
    check_op(ours, rms_norm_reference, x, w, 1e-5, 1.0, names=("x", "weight"))


@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_addition(device, dtype, weight_grad):
    x = torch.randn(5, 96, device=device).to(dtype).requires_grad_()
    r = torch.randn(5, 96, device=device).to(dtype).requires_grad_()
    w = torch.randn(96, device=device).to(dtype).requires_grad_(weight_grad)
    check_op(add_rms_norm, add_reference, x, r, w, names=("x", "residual", "weight"))


def test_only_the_sum_is_used(device):
    x, r = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    check_op(lambda *a: add_rms_norm(*a)[1], lambda *a: add_reference(*a)[1], x, r, torch.ones(8, device=device))


def test_no_weight(device):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    check_op(ours, rms_norm_reference, x, None, 1e-6, 0.0)


def test_more_rows_than_programs(device):
    x = torch.randn(70, 130, device=device, requires_grad=True)
    w = torch.randn(130, device=device, requires_grad=True)
    check_op(ours, rms_norm_reference, x, w, 1e-6, 0.0)


@pytest.mark.parametrize("layout", ["columns of a wider buffer", "every second", "transposed"])
def test_layouts(device, layout):
    base = torch.randn(2, 6, 37, device=device, dtype=torch.float16, requires_grad=True)
    w = torch.randn(37, device=device, dtype=torch.float16, requires_grad=True)
    check_op(ours, rms_norm_reference, layouts(base)[layout], w, 1e-6, 0.0)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0,)])
def test_empty(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    w = torch.randn(shape[-1], device=device, requires_grad=True)
    check_op(ours, rms_norm_reference, x, w, 1e-6, 0.0)
    ours(x, w).sum().backward()
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_writes_into_columns_of_a_wider_buffer(device):
    x, w = torch.randn(4, 24, device=device), torch.randn(24, device=device)
    buffer = torch.full((4, 30), 7.0, device=device)
    rms_norm_forward(x, w, 1e-6, out=buffer[:, :24])
    torch.testing.assert_close(buffer[:, :24], rms_norm_reference(x, w, 1e-6))
    assert (buffer[:, 24:] == 7).all()
    assert rms_norm_backward(x, x, w, 1e-6)[1] is None


def test_a_residual_stream_that_is_wider_than_the_products(device):
    x, residual, weight = (torch.randn(shape, device=device) for shape in ((5, 72), (5, 72), (72,)))
    x = x.bfloat16()
    y, h = rms_norm_forward(x, weight, 1e-6, residual=residual, out=torch.empty_like(x))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(y.float(), rms_norm_reference(h, weight, 1e-6), rtol=8e-3, atol=8e-3)
    dy, past = torch.randn_like(x), torch.randn_like(h)
    dx, dweight = rms_norm_backward(dy, h, weight, 1e-6, dh=past, weight_grad=True)
    leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(rms_norm_reference(*leaves, 1e-6), leaves, dy.float())
    assert dx.dtype == dweight.dtype == torch.float32
    torch.testing.assert_close(dx, expected[0] + past)
    torch.testing.assert_close(dweight, expected[1])


def test_tiny_and_huge_values(device):
    x = torch.tensor([[1e-20] * 8, [1e15] * 8, [0.0] * 8], device=device, requires_grad=True)
    check_op(ours, rms_norm_reference, x, torch.ones(8, device=device), 1e-6, 0.0)


def test_bad_input(device):
    x, w = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    with pytest.raises(ConfigError, match="weight has the wrong shape"):
        rms_norm(x, torch.randn(7, device=device))
    with pytest.raises(ConfigError, match="not floating point"):
        rms_norm(x.int(), w)
    with pytest.raises(ConfigError, match="another device"):
        rms_norm(x, w.to("meta"))
    with pytest.raises(ConfigError, match="residual has the wrong shape"):
        add_rms_norm(x, x[:2], w)
    y, h = add_rms_norm(x.half(), x, w)  # mixed dtypes: the reference, which promotes
    assert h.dtype == torch.float32 and y.dtype == torch.float32
    assert rms_norm(x.double(), w.double()).dtype == torch.float64
    torch.testing.assert_close(rms_norm(x, w, fast=False), rms_norm(x, w))
