import pytest
import torch

from unsloth.quant import fp8


def reference(weight, scale, block):
    """The definition, entry by entry."""
    values = torch.empty(weight.shape)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            values[n, k] = weight[n, k].float() * scale[n // block[0], k // block[1]]
    return values


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (3, 20), (1, 1)])
def test_blocks_are_scaled_also_where_they_are_cut_by_the_edge(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 4), -(-shape[1] // 6)) + 0.5
    assert torch.equal(fp8.dequantize(weight, scale, (4, 6)), reference(weight, scale, (4, 6)))


def test_one_scale_for_the_matrix_and_a_stack_of_matrices():
    weight = torch.randn(3, 8, 8).to(torch.float8_e4m3fn)
    assert torch.equal(fp8.dequantize(weight, torch.tensor(0.5), None), weight.float() / 2)
    scale = torch.rand(3, 2, 2)
    stacked = fp8.dequantize(weight, scale, (4, 4))
    assert all(torch.equal(stacked[i], reference(weight[i], scale[i], (4, 4))) for i in range(3))


def test_scales_that_do_not_cover_the_weight_are_refused():
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    for block in [None, (4, 8)]:
        with pytest.raises(ValueError, match="do not fit"):
            fp8.dequantize(weight, torch.ones(2, 2), block)


def test_quantizing_keeps_three_bits_of_mantissa():
    torch.manual_seed(0)
    values = torch.randn(10, 14) * torch.logspace(-3, 3, 10)[:, None]
    weight, scale = fp8.quantize(values, (4, 4))
    assert weight.shape == values.shape and scale.shape == (3, 4)
    largest = torch.nn.functional.pad(values.abs(), (0, 2, 0, 2)).view(3, 4, 4, 4).amax((1, 3))
    error = (fp8.dequantize(weight, scale, (4, 4)) - values).abs()
    # Half of the last of 3 bits, or of the smallest step (2 ** -9) of the block's scale.
    bound = values.abs() / 16 + largest.repeat_interleave(4, 0)[:10].repeat_interleave(4, 1)[:, :14] / 448 * 2**-10
    assert (error <= bound * 1.001).all()
    assert fp8.quantize(torch.zeros(4, 4), (4, 4))[1].eq(1).all()
