import pytest
import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.int8 import dequantize_int8, dequantize_int8_reference


def inputs(n, k, device, groups=None):
    q = torch.randint(-128, 128, (n, k), device=device, dtype=torch.int8)
    return q, torch.rand(n, *([] if groups is None else [groups]), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(1, 1, None), (3, 7, None), (5, 64, None), (3, 2100, 1), (4, 96, 3), (2, 6, 3)]
)
def test_equals_the_formula(device, n, k, groups, dtype):
    q, scale = inputs(n, k, device, groups)
    expected = dequantize_int8_reference(q, scale.view(n, -1), dtype)
    got = dequantize_int8(q, scale, dtype=dtype)
    # the interpreter truncates to bfloat16 instead of rounding
    tolerance = 2**-7 if dtype == torch.bfloat16 and device.type == "cpu" else 0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    assert torch.equal(dequantize_int8(q, scale, dtype=dtype, fast=False), expected)


def test_equals_bitsandbytes(device):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(6, 128, device=device, dtype=torch.float16)
    q, scb, _ = functional.int8_vectorwise_quant(matrix)
    expected = functional.int8_vectorwise_dequant(q, scb)
    torch.testing.assert_close(dequantize_int8(q, scb / 127, dtype=torch.float32), expected.float(), rtol=1e-6, atol=0)


def test_strided_output_and_layouts(device):
    q, scale = inputs(5, 48, device)
    expected = dequantize_int8_reference(q, scale[:, None], torch.float32)
    buffer = torch.full((5, 60), 7.0, device=device)
    assert torch.equal(dequantize_int8(q, scale, out=buffer[:, :48]), expected) and (buffer[:, 48:] == 7).all()
    assert torch.equal(dequantize_int8(q.T.contiguous().T, scale, dtype=torch.float32), expected)
    assert torch.equal(dequantize_int8(q, scale.repeat(2, 1).T[:, 0], dtype=torch.float32), expected)
    assert dequantize_int8(q[:0], scale[:0]).shape == (0, 48)


def test_bad_input(device):
    q, scale = inputs(5, 48, device)
    with pytest.raises(ConfigError, match="no 8-bit matrix"):
        dequantize_int8(q.to(torch.uint8), scale)
    with pytest.raises(ConfigError, match="scale does not fit"):
        dequantize_int8(q, scale[:4])
    with pytest.raises(ConfigError, match="scale does not fit"):
        dequantize_int8(q, torch.ones(5, 7, device=device))
    with pytest.raises(ConfigError, match="out cannot hold"):
        dequantize_int8(q, scale, out=torch.empty(5, 47, device=device))
