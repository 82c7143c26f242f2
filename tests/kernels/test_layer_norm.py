import pytest
import torch
from check_op import ODD_SHAPES, check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_backward, layer_norm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def add_reference(x, r, w, b, eps=1e-5):
    return layer_norm_reference(x + r, w, b, eps), x + r


def parameters(n, device, dtype):
    return [torch.randn(n, device=device).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_output_and_gradients(device, shape, dtype):
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype).requires_grad_()
    check_op(layer_norm, layer_norm_reference, x, *parameters(shape[-1], device, dtype), 1e-5, names=("x", "w", "b"))


def test_reference_is_torch(device):
    x = torch.randn(3, 17, device=device)
    w, b = parameters(17, device, torch.float32)
    torch.testing.assert_close(layer_norm(x, w, b), torch.nn.functional.layer_norm(x, (17,), w, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_addition(device, dtype):
    x, r = (torch.randn(2, 3, 96, device=device).to(dtype).requires_grad_() for _ in range(2))
    check_op(add_layer_norm, add_reference, x, r, *parameters(96, device, dtype), 1e-5)


def test_without_parameters_and_with_one_trained(device):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    w, b = parameters(40, device, torch.float32)
    check_op(layer_norm, layer_norm_reference, x, None, None, 1e-5)
    check_op(layer_norm, layer_norm_reference, x, w.detach(), b, 1e-5)
    check_op(layer_norm, layer_norm_reference, x, w, None, 1e-5)


def test_more_rows_than_programs(device):
    x = torch.randn(70, 130, device=device, requires_grad=True)
    check_op(layer_norm, layer_norm_reference, x, *parameters(130, device, torch.float32), 1e-5)


@pytest.mark.parametrize("layout", ["columns of a wider buffer", "every second", "transposed"])
def test_layouts(device, layout):
    base = torch.randn(2, 6, 37, device=device, dtype=torch.float16, requires_grad=True)
    check_op(layer_norm, layer_norm_reference, layouts(base)[layout], *parameters(37, device, torch.float16), 1e-5)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0,)])
def test_empty(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    check_op(layer_norm, layer_norm_reference, x, *parameters(shape[-1], device, torch.float32), 1e-5)


def test_bad_input(device):
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ConfigError, match="bias has the wrong shape"):
        layer_norm(x, None, torch.randn(7, device=device))
    with pytest.raises(ConfigError, match="not floating point"):
        layer_norm(x.int(), None)
    with pytest.raises(ConfigError, match="another device"):
        add_layer_norm(x, x.to("meta"), None)


@pytest.mark.parametrize("shape", [(4, 4096), (3, 4096), (5, 2500)])
def test_tiles_of_two_rows_with_and_without_masks(device, shape):
    x = torch.randn(shape, device=device).bfloat16().requires_grad_()
    check_op(layer_norm, layer_norm_reference, x, *parameters(shape[1], device, torch.bfloat16), 1e-5)


@pytest.mark.parametrize("shape", [(4, 4096), (7, 33)])
def test_statistics_kept_or_computed_again(device, shape):
    h, dy, w = (
        torch.randn(shape, device=device),
        torch.randn(shape, device=device),
        torch.randn(shape[1], device=device),
    )
    mean = h.mean(1)
    stats = torch.stack((mean, (h.var(1, unbiased=False) + 1e-5).rsqrt()), 1)
    again = layer_norm_backward(dy, h, w, 1e-5, None, torch.float32)
    kept = layer_norm_backward(dy, h, w, 1e-5, None, torch.float32, stats)
    for first, second in zip(again, kept, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
