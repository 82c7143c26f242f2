import pytest
import torch
from check_op import assert_close
from test_nf4_matmul import quantize

from unsloth.core.errors import ConfigError
from unsloth.kernels.nf4 import dequantize_nf4_reference
from unsloth.kernels.nf4_lora import StackedAdapters, nf4_lora_linears, project_few
from unsloth.kernels.nf4_matmul import nf4_linear_reference


def stack(outs, k, rank, device, dtype):
    a = (torch.randn(rank * len(outs), k, device=device) / k**0.5).to(dtype)
    return StackedAdapters(a, tuple(torch.randn(n, rank, device=device).to(dtype) for n in outs), (0.5,) * len(outs))


def truth(x, weight, adapters, i):
    rank = adapters.b[0].shape[1]
    t = x.double() @ adapters.a[i * rank : (i + 1) * rank].double().T
    return x.double() @ dequantize_nf4_reference(weight, torch.float64).T + 0.5 * t @ adapters.b[i].double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize(
    ("rows", "outs", "k"),
    [(1, (33, 16), 576), (5, (7, 8, 9), 128), (16, (40,), 64), (20, (8, 70), 64), (40, (8,), 320)],
)
def test_equals_separate_products(device, rows, outs, k, rank, dtype):
    weights = [quantize(n, k, device) for n in outs]
    adapters = stack(outs, k, rank, device, dtype)
    x = torch.randn(rows, k, device=device).to(dtype)
    ours = nf4_lora_linears(x, weights, adapters)
    plain = nf4_lora_linears(x, weights, adapters, fast=False)
    for i, weight in enumerate(weights):
        assert_close(ours[i], plain[i], truth(x, weight, adapters, i), f"y {i}")


@pytest.mark.parametrize("rows", [1, 18])
def test_matrices_that_no_launch_takes_together(device, rows):
    """Of several ranks, and without double quantization here and there."""
    outs, ranks, k = (33, 16, 20), (16, 32, 16), 128
    weights = [quantize(n, k, device, nested=i != 1) for i, n in enumerate(outs)]
    b = tuple(torch.randn(n, r, device=device).half() for n, r in zip(outs, ranks, strict=True))
    adapters = StackedAdapters((torch.randn(sum(ranks), k, device=device) / 12).half(), b, (0.5, 1.0, 2.0))
    x = torch.randn(rows, k, device=device).half()
    ours, plain = nf4_lora_linears(x, weights, adapters), nf4_lora_linears(x, weights, adapters, fast=False)
    alone = nf4_lora_linears(x, weights, None)
    for i, (weight, a) in enumerate(zip(weights, adapters.a.split(ranks), strict=True)):
        exact = x.double() @ dequantize_nf4_reference(weight, torch.float64).T
        assert_close(alone[i], nf4_linear_reference(x, weight), exact, f"y {i}, no adapter")
        exact += adapters.scales[i] * (x.double() @ a.double().T) @ b[i].double().T
        assert_close(ours[i], plain[i], exact, f"y {i}")


def test_without_adapters_and_shapes(device):
    weights = [quantize(24, 128, device)]
    x = torch.randn(2, 3, 128, device=device, dtype=torch.float16)
    assert torch.equal(
        nf4_lora_linears(x, weights, None)[0], nf4_lora_linears(x.view(6, 128), weights, None)[0].view(2, 3, 24)
    )
    adapters = stack((24,), 128, 16, device, torch.float16)
    assert nf4_lora_linears(x, weights, adapters)[0].shape == (2, 3, 24)
    assert nf4_lora_linears(x[:0], weights, adapters)[0].shape == (0, 3, 24)


@pytest.mark.parametrize(("rows", "rank", "k"), [(1, 16, 64), (16, 40, 700), (3, 5, 5000), (70, 24, 600)])
def test_projection_in_parts(device, rows, rank, k):
    x, a = torch.randn(rows, k, device=device).bfloat16(), torch.randn(rank, k, device=device).bfloat16()
    parts = project_few(x, a)
    assert parts.shape[0] <= 8 and parts.shape[1:] == (rows, rank)
    torch.testing.assert_close(parts.sum(0).double(), x.double() @ a.double().T, rtol=1e-5, atol=1e-3)


def test_bad_input(device):
    adapters = stack((24,), 128, 16, device, torch.float16)
    with pytest.raises(ConfigError, match="one adapter a matrix"):
        nf4_lora_linears(torch.randn(1, 128, device=device).half(), [quantize(24, 128, device)] * 2, adapters)
    with pytest.raises(ConfigError, match="do not fit the weights"):
        nf4_lora_linears(torch.randn(1, 64, device=device).half(), [quantize(24, 128, device)], None)
    with pytest.raises(ConfigError, match="do not fit together"):
        StackedAdapters(adapters.a[:8], adapters.b, adapters.scales)
