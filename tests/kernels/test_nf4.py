import dataclasses

import pytest
import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantize(matrix, blocksize=64, nested=True, quant_type="nf4", storage=torch.uint8):
    packed, state = functional.quantize_4bit(
        matrix, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    return NF4Weight.from_quant_state(packed, state), functional.dequantize_4bit(packed, state)


def same(got, expected):
    """Equal to the bit; the interpreter truncates to bfloat16 instead of rounding, so there within one unit."""
    if got.dtype == torch.bfloat16 and not got.is_cuda:
        return got.shape == expected.shape and (got.view(torch.int16) - expected.view(torch.int16)).abs().max() <= 1
    return torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (8, 8), (3, 192), (70, 64), (130, 256)])
def test_equals_bitsandbytes_to_the_bit(device, shape, nested, dtype):
    weight, expected = quantize(torch.randn(shape, device=device).to(dtype), nested=nested)
    assert same(dequantize_nf4(weight), expected)
    assert torch.equal(dequantize_nf4(weight, fast=False), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_other_blocks_and_types(device, blocksize, quant_type):
    weight, expected = quantize(torch.randn(9, 512, device=device), blocksize, quant_type=quant_type)
    assert same(dequantize_nf4(weight), expected)


def test_stored_as_bfloat16_and_other_output_dtype(device):
    weight, expected = quantize(torch.randn(16, 128, device=device, dtype=torch.bfloat16), storage=torch.bfloat16)
    assert same(dequantize_nf4(weight), expected)
    wide = dequantize_nf4(weight, dtype=torch.float32)
    assert torch.equal(wide.bfloat16(), expected) and torch.equal(wide, dequantize_nf4_reference(weight, torch.float32))


@pytest.mark.parametrize("shape", [(5, 72), (40, 512), (3, 4096)])
def test_writes_into_a_strided_buffer(device, shape):
    weight, expected = quantize(torch.randn(shape, device=device))
    buffer = torch.full((shape[0], shape[1] + 40), 7.0, device=device)
    got = dequantize_nf4(weight, out=buffer[:, : shape[1]])
    assert torch.equal(got, expected) and (buffer[:, shape[1] :] == 7).all()
    odd = torch.full((shape[0], shape[1] + 3), 7.0, device=device)
    assert torch.equal(dequantize_nf4(weight, out=odd[:, 1 : shape[1] + 1]), expected)
    assert (odd[:, 0] == 7).all() and (odd[:, shape[1] + 1 :] == 7).all()


def test_columns_that_are_no_whole_words(device):
    weight, expected = quantize(torch.randn(8, 12, device=device))
    assert same(dequantize_nf4(weight), expected)
    buffer = torch.zeros(8, 20, device=device)
    assert torch.equal(dequantize_nf4(weight, out=buffer[:, :12]), expected)
    weight, expected = quantize(torch.randn(3, 6, device=device))
    assert same(dequantize_nf4(weight), expected)


def test_bad_input(device):
    weight, _ = quantize(torch.randn(16, 128, device=device))
    with pytest.raises(ConfigError, match="out cannot hold"):
        dequantize_nf4(weight, out=torch.empty(16, 127, device=device))
    with pytest.raises(ConfigError, match="out cannot hold"):
        dequantize_nf4(weight, out=torch.empty(128, 16, device=device).T)
    with pytest.raises(ConfigError, match="out cannot hold"):
        dequantize_nf4(weight, out=torch.empty(16, 128, device=device, dtype=torch.int32))
    with pytest.raises(ConfigError, match="wrong packed values"):
        dataclasses.replace(weight, shape=(16, 64))
    with pytest.raises(ConfigError, match="do not fit"):
        dataclasses.replace(weight, blocksize=128)
    with pytest.raises(ConfigError, match="half nested"):
        dataclasses.replace(weight, offset=None)
    with pytest.raises(ConfigError, match="another device"):
        dataclasses.replace(weight, code=weight.code.to("meta"))
    packed, state = functional.quantize_4bit(torch.randn(16, 128, device=device), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="repacked"):
        NF4Weight.from_quant_state(packed, state)
