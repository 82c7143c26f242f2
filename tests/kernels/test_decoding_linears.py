import pytest
import torch
from check_op import assert_close
from test_nf4_matmul import quantize

from unsloth.core.errors import ConfigError
from unsloth.generate.adapter_bank import Selection, Site
from unsloth.generate.weights import Projection
from unsloth.kernels.decoding_linears import StackedAdapters, decoding_gate, decoding_linears, gates, project_few
from unsloth.kernels.dense_rows import DenseShape, dense_shape, multiply_dense
from unsloth.kernels.nf4 import dequantize_nf4_reference
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
    ours = decoding_linears(x, weights, adapters)
    plain = decoding_linears(x, weights, adapters, fast=False)
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
    ours, plain = decoding_linears(x, weights, adapters), decoding_linears(x, weights, adapters, fast=False)
    alone = decoding_linears(x, weights, None)
    for i, (weight, a) in enumerate(zip(weights, adapters.a.split(ranks), strict=True)):
        exact = x.double() @ dequantize_nf4_reference(weight, torch.float64).T
        assert_close(alone[i], nf4_linear_reference(x, weight), exact, f"y {i}, no adapter")
        exact += adapters.scales[i] * (x.double() @ a.double().T) @ b[i].double().T
        assert_close(ours[i], plain[i], exact, f"y {i}")


def test_without_adapters_and_shapes(device):
    weights = [quantize(24, 128, device)]
    x = torch.randn(2, 3, 128, device=device, dtype=torch.float16)
    assert torch.equal(
        decoding_linears(x, weights, None)[0], decoding_linears(x.view(6, 128), weights, None)[0].view(2, 3, 24)
    )
    adapters = stack((24,), 128, 16, device, torch.float16)
    assert decoding_linears(x, weights, adapters)[0].shape == (2, 3, 24)
    assert decoding_linears(x[:0], weights, adapters)[0].shape == (0, 3, 24)


@pytest.mark.parametrize(("rows", "rank", "k"), [(1, 16, 64), (16, 40, 700), (3, 5, 5000), (70, 24, 600)])
def test_projection_in_parts(device, rows, rank, k):
    x, a = torch.randn(rows, k, device=device).bfloat16(), torch.randn(rank, k, device=device).bfloat16()
    parts = project_few(x, a)
    assert parts.shape[0] <= 8 and parts.shape[1:] == (rows, rank)
    torch.testing.assert_close(parts.sum(0).double(), x.double() @ a.double().T, rtol=1e-5, atol=1e-3)


def test_bad_input(device):
    adapters = stack((24,), 128, 16, device, torch.float16)
    with pytest.raises(ConfigError, match="one adapter a matrix"):
        decoding_linears(torch.randn(1, 128, device=device).half(), [quantize(24, 128, device)] * 2, adapters)
    with pytest.raises(ConfigError, match="do not fit the weights"):
        decoding_linears(torch.randn(1, 64, device=device).half(), [quantize(24, 128, device)], None)
    with pytest.raises(ConfigError, match="do not fit together"):
        StackedAdapters(adapters.a[:8], adapters.b, adapters.scales)


def dense_case(device, rows, outs, k, rank, adapters, dtype):
    """x, matrices, stacked adapters and a mask in which every fourth row has none."""
    weights = [(torch.randn(n, k, device=device) / k**0.5).to(dtype) for n in outs]
    mask = torch.zeros(rows, adapters, device=device, dtype=dtype)
    mask[torch.arange(rows), torch.arange(rows) % adapters] = 1
    mask[::4] = 0
    x = torch.randn(rows, k, device=device).to(dtype)
    return x, weights, stack(outs, k, rank * adapters, device, dtype), mask


def wide(adapters):
    return StackedAdapters(adapters.a.double(), tuple(b.double() for b in adapters.b), adapters.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outs", "k", "rank", "adapters"),
    [(2, (33, 16), 576, 16, 1), (5, (7, 8, 9), 128, 32, 3), (20, (140,), 2048, 16, 2), (130, (8,), 64, 16, 1)]
    + [(40, (8, 70, 65), 320, 48, 1), (128, (65,), 64, 16, 5), (1, (16,), 64, 16, 2), (3, (8, 8), 60, 8, 2)],
)
def test_sixteen_bit_weights(device, rows, outs, k, rank, adapters, dtype):
    x, weights, stacked, mask = dense_case(device, rows, outs, k, rank, adapters, dtype)
    for own in (mask, None):
        ours = decoding_linears(x, weights, stacked, own)
        plain = decoding_linears(x, weights, stacked, own, fast=False)
        exact = None if own is None else own.double()
        truth = decoding_linears(x.double(), [w.double() for w in weights], wide(stacked), exact, fast=False)
        for y, p, t in zip(ours, plain, truth, strict=True):
            assert_close(y, p, t, "y")
    for y, w in zip(decoding_linears(x, weights, None), weights, strict=True):
        assert_close(y, x @ w.T, x.double() @ w.double().T, "y, no adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "n", "k", "adapters"), [(5, 70, 192, 2), (66, 40, 64, 1)])
def test_gated_unit(device, rows, n, k, adapters, activation, dtype):
    x, weights, stacked, mask = dense_case(device, rows, (n, n), k, 16, adapters, dtype)
    assert gates(x, weights, stacked, mask) == (dtype == torch.bfloat16)
    for own in (mask, None):
        ours = decoding_gate(x, weights, stacked, own, activation)
        plain = decoding_gate(x, weights, stacked, own, activation, fast=False)
        exact = None if own is None else own.double()
        doubles = [w.double() for w in weights]
        truth = decoding_gate(x.double(), doubles, wide(stacked), exact, activation, fast=False)
        assert_close(ours, plain, truth, "h")
    alone = decoding_gate(x, weights, None, None, activation)
    truth = decoding_gate(x.double(), doubles, None, None, activation)
    assert_close(alone, decoding_gate(x, weights, None, None, activation, fast=False), truth, "h, no adapter")


def test_sixteen_bit_weights_of_several_ranks(device):
    x, weights, _, _ = dense_case(device, 6, (33, 20), 64, 16, 1, torch.bfloat16)
    b = tuple(torch.randn(n, r, device=device).bfloat16() for n, r in zip((33, 20), (16, 32), strict=True))
    adapters = StackedAdapters((torch.randn(48, 64, device=device) / 8).bfloat16(), b, (0.5, 2.0))
    ours, plain = (decoding_linears(x, weights, adapters, fast=fast) for fast in (True, False))
    truth = decoding_linears(x.double(), [w.double() for w in weights], wide(adapters), fast=False)
    for y, p, t in zip(ours, plain, truth, strict=True):
        assert_close(y, p, t, "y")


@pytest.mark.parametrize("shape", [(16, 64, 128, 3, 4, 4), (32, 128, 64, 8, 4, 3), (64, 64, 128, 1, 8, 3)])
def test_sixteen_bit_tiles_of_every_kind(device, shape):
    """Parts of K without a step, tiles that hang over."""
    x, weights, stacked, mask = dense_case(device, 37, (140, 20, 65), 640, 16, 2, torch.float16)
    side = stacked.side(project_few(x, stacked.a), slice(None), mask)
    ours = multiply_dense(x, weights, side=side, shape=DenseShape(*shape))
    plain = decoding_linears(x, weights, stacked, mask, fast=False)
    truth = decoding_linears(x.double(), [w.double() for w in weights], wide(stacked), mask.double(), fast=False)
    for y, p, t in zip(ours, plain, truth, strict=True):
        assert_close(y, p, t, "y")


def test_shapes_of_sixteen_bit_tiles():
    """K is split where N alone leaves multiprocessors idle, and what is loaded ahead fits a program's memory."""
    assert dense_shape(32, [4096], 4096, 132, 227 * 2**10).split == 2
    assert dense_shape(128, [14336, 14336], 4096, 132, 227 * 2**10).split == 1
    for processors, room in ((132, 227 * 2**10), (108, 163 * 2**10), (128, 99 * 2**10)):
        for rows, sizes, k in (
            (1, [8], 64),
            (20, [4096, 1024], 4096),
            (64, [28672], 4096),
            (128, [14336] * 2, 4096),
            (66, [40, 40], 64),
        ):
            shape = dense_shape(rows, sizes, k, processors, room)
            assert k % shape.step == 0 and 2 * shape.stages * shape.step * (shape.tile + shape.batch) <= room
            shape = dense_shape(rows, sizes, k, processors, room, gated=True)
            assert shape.split == 1 and 2 * shape.stages * shape.step * (128 + shape.batch) <= room


@pytest.mark.parametrize(("rows", "rank", "adapters"), [(5, 16, 2), (20, 16, 3), (40, 48, 2)])
def test_several_adapters_in_one_batch_of_four_bit_weights(device, rows, rank, adapters):
    x, _, stacked, mask = dense_case(device, rows, (33, 20), 320, rank, adapters, torch.float16)
    weights = [quantize(n, 320, device) for n in (33, 20)]
    ours, plain = (decoding_linears(x, weights, stacked, mask, fast=fast) for fast in (True, False))
    exact = [dequantize_nf4_reference(w, torch.float64) for w in weights]
    truth = decoding_linears(x.double(), exact, wide(stacked), mask.double(), fast=False)
    for y, p, t in zip(ours, plain, truth, strict=True):
        assert_close(y, p, t, "y")


def test_bad_masks_and_units(device):
    x, weights, stacked, mask = dense_case(device, 6, (33, 20), 64, 16, 3, torch.bfloat16)
    for wrong in (mask[:-1], mask[0], mask[:, :0], torch.ones(6, 5, device=device)):
        with pytest.raises(ConfigError, match="the mask does not fit"):
            decoding_linears(x, weights, stacked, wrong)
    with pytest.raises(ConfigError, match="no gated unit"):
        decoding_gate(x, weights, stacked, mask, "silu")
    with pytest.raises(ConfigError, match="no gated unit"):
        decoding_gate(x, weights[:1] * 2, None, None, "relu")


@pytest.mark.parametrize("biased", [False, True])
def test_sites_of_the_engine(device, biased):
    x, weights, stacked, mask = dense_case(device, 6, (48, 48), 64, 16, 2, torch.bfloat16)
    projections = []
    for w in weights:
        layer = torch.nn.Linear(64, 48, bias=biased, device=device, dtype=torch.bfloat16).requires_grad_(False)
        layer.weight.copy_(w)
        projections.append(Projection("layer", layer, None, None, opaque=False))
    whole = StackedAdapters(stacked.a, stacked.b, (1.0, 1.0))  # as the bank makes them
    site = Site("site", projections, stacked.a, list(stacked.b), whole)
    doubles, biases = [w.double() for w in weights], [p.module.bias.double() if biased else 0 for p in projections]
    for used, own in ((True, mask), (True, None), (False, None)):
        adapters, exact = Selection(used, own), None if own is None else own.double()
        sums = decoding_linears(x.double(), doubles, wide(whole) if used else None, exact, fast=False)
        truth = [y + bias for y, bias in zip(sums, biases, strict=True)]
        for ours, plain, t in zip(site(x, adapters), site(x, adapters, fast=False), truth, strict=True):
            assert_close(ours, plain, t, "y")
        ours, plain = (site.gated(x, adapters, "silu", fast) for fast in (True, False))
        assert_close(ours, plain, torch.nn.functional.silu(truth[0]) * truth[1], "h")
