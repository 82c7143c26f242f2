import pytest
import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.mxfp4 import dequantize_mxfp4, dequantize_mxfp4_reference

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def inputs(shape, device, low=110, high=140):
    blocks = torch.randint(0, 256, (*shape, 16), device=device, dtype=torch.uint8)
    return blocks, torch.randint(low, high, shape, device=device, dtype=torch.uint8)


def test_every_value_and_scale(device):
    blocks = torch.arange(256, device=device, dtype=torch.uint8).view(1, 16, 16).repeat(16, 1, 1)
    scales = torch.arange(256, device=device, dtype=torch.uint8).view(16, 16)
    got = dequantize_mxfp4(blocks, scales, dtype=torch.float32)
    expected = torch.empty(16, 16, 32, dtype=torch.float64)
    for row in range(16):
        for group in range(16):
            for byte in range(16):
                for place, nibble in enumerate((16 * group + byte & 15, 16 * group + byte >> 4)):
                    value = E2M1[nibble & 7] * (-1 if nibble & 8 else 1)
                    expected[row, group, 2 * byte + place] = value * 2.0 ** (16 * row + group - 127)
    expected[15, 15] = torch.nan
    torch.testing.assert_close(got.cpu(), expected.flatten(1).float(), rtol=0, atol=0, equal_nan=True)
    slow = dequantize_mxfp4(blocks, scales, dtype=torch.float32, fast=False)
    torch.testing.assert_close(got, slow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 70), (4,)])
def test_shapes(device, shape, dtype):
    blocks, scales = inputs(shape, device)
    got = dequantize_mxfp4(blocks, scales, dtype=dtype)
    assert got.shape == (*shape[:-1], shape[-1] * 32)
    torch.testing.assert_close(got, dequantize_mxfp4_reference(blocks, scales, dtype), rtol=0, atol=0)


def test_strided_output_and_layouts(device):
    blocks, scales = inputs((5, 2), device)
    expected = dequantize_mxfp4_reference(blocks, scales, torch.float32)
    buffer = torch.full((5, 70), 7.0, device=device)
    assert torch.equal(dequantize_mxfp4(blocks, scales, out=buffer[:, :64]), expected) and (buffer[:, 64:] == 7).all()
    turned = blocks.transpose(0, 1).contiguous().transpose(0, 1), scales.T.contiguous().T
    assert torch.equal(dequantize_mxfp4(*turned, dtype=torch.float32), expected)
    assert dequantize_mxfp4(blocks[:0], scales[:0]).shape == (0, 64)


def test_bad_input(device):
    blocks, scales = inputs((5, 2), device)
    with pytest.raises(ConfigError, match="do not fit"):
        dequantize_mxfp4(blocks, scales[:4])
    with pytest.raises(ConfigError, match="do not fit"):
        dequantize_mxfp4(blocks.int(), scales)
    with pytest.raises(ConfigError, match="one device"):
        dequantize_mxfp4(blocks, scales.to("meta"))
    with pytest.raises(ConfigError, match="out cannot hold"):
        dequantize_mxfp4(blocks, scales, out=torch.empty(5, 63, device=device))
