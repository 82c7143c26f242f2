import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4_reference
from unsloth.kernels.nf4_matmul import (
    PAIRS_OF_WORD,
    TileShape,
    arrange,
    multiply_tiles,
    nf4_linear,
    nf4_linear_reference,
    takes_table,
    tile_shape,
)

functional = pytest.importorskip("bitsandbytes.functional")


def quantize(n, k, device, blocksize=64, nested=True):
    packed, state = functional.quantize_4bit(
        torch.randn(n, k, device=device, dtype=torch.bfloat16), blocksize=blocksize, compress_statistics=nested,
        quant_type="nf4",
    )  # fmt: skip
    return NF4Weight.from_quant_state(packed, state)


def check(x, weight):
    truth = x.double() @ dequantize_nf4_reference(weight, torch.float64).T
    assert_close(nf4_linear(x, weight), nf4_linear_reference(x, weight), truth, "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (21, 320)])
def test_matrix_vector(device, rows, n, k, dtype):
    check(torch.randn(rows, k, device=device).to(dtype), quantize(n, k, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "k"), [(5, 1, 64), (9, 70, 320), (33, 20, 128), (130, 65, 192), (8, 16, 1088)])
def test_small_batch(device, rows, n, k, dtype):
    check(torch.randn(rows, k, device=device).to(dtype), quantize(n, k, device))


@pytest.mark.parametrize(("blocksize", "nested"), [(64, False), (128, True), (32, True)])
@pytest.mark.parametrize("rows", [2, 6, 40])
def test_other_blocks(device, rows, blocksize, nested):
    check(torch.randn(rows, 256, device=device).half(), quantize(24, 256, device, blocksize, nested))


@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize(
    ("batch", "tile", "blocks", "warps", "stages"),
    [(32, 128, 4, 8, 3), (32, 128, 2, 8, 4), (64, 64, 1, 4, 6), (128, 64, 1, 4, 4)],
)
def test_tiles_of_every_kind(device, batch, tile, blocks, warps, stages, split):
    """Parts of K without a block, steps and tiles that hang over, scales that change within a row.

    On a GPU with a table the shapes must take more than 48 KiB and fit, see tile_shape.
    """
    weight = quantize(140, 64 * 9, device)
    x = torch.randn(37, 64 * 9, device=device).half()
    (y,) = multiply_tiles(x, [weight], shape=TileShape(batch, tile, blocks, split, warps, stages))
    truth = x.double() @ dequantize_nf4_reference(weight, torch.float64).T
    assert_close(y, nf4_linear_reference(x, weight), truth, "y")


def test_shapes_of_tiles():
    """K is split where N alone leaves multiprocessors idle; little shared memory takes small tiles and no table."""
    h100, turing = (132, 227 * 2**10), (40, 64 * 2**10)
    assert tile_shape(20, [14336], 4096, *h100)[3] == 2 and tile_shape(100, [14336, 14336], 4096, *h100)[3] == 1
    assert tile_shape(100, [4096], 14336, *h100)[3] == 4 and tile_shape(20, [8], 64, *h100)[3] == 1
    for rows in (9, 33, 65, 128):
        assert tile_shape(rows, [4096], 4096, *h100)[0] >= rows
        assert tile_shape(rows, [4096], 4096, *turing)[0] <= 32
    assert takes_table(h100[1]) and not takes_table(turing[1])


def test_three_matrices_in_one_launch(device):
    weights = [quantize(n, 192, device) for n in (140, 3, 33)]
    x = torch.randn(19, 192, device=device).half()
    for weight, y in zip(weights, multiply_tiles(x, weights, shape=TileShape(32, 128, 2, 2, 8, 4)), strict=True):
        truth = x.double() @ dequantize_nf4_reference(weight, torch.float64).T
        assert_close(y, nf4_linear_reference(x, weight), truth, "y")


def test_a_word_decoded_from_the_table():
    """The instructions that look up a word's pairs, and where decode_tile puts its values: where x's columns are."""
    word, code = 0x7A3C01F8, torch.arange(16)
    lines = [line.strip().rstrip(";") for line in PAIRS_OF_WORD.value.splitlines()]
    picked = [int(line.split()[-1]) - 0x4440 for line in lines if line.startswith("prmt")]
    values = [code[word >> shift & 15] for byte in picked for shift in (8 * byte + 4, 8 * byte)]
    tile = torch.full((8, 4, 2), -1)  # word, byte, nibble
    tile[0] = torch.stack(values).view(4, 2)
    columns = torch.arange(64)[None].to(torch.int16)
    order = columns.view(8, 4, 2).transpose(0, 1).reshape(64)
    decoded = tile.transpose(0, 1).reshape(64)
    nibbles = [word >> shift & 15 for byte in range(4) for shift in (8 * byte + 4, 8 * byte)]
    for place, column in enumerate(order.tolist()):
        assert decoded[place] == (nibbles[column] if column < 8 else -1)


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (3, 320), (2, 4160)])
def test_columns_arranged(device, rows, k):
    x = torch.randn(rows, k + 6, device=device).bfloat16()
    expected = x[:, :k].reshape(rows, k // 64, 8, 4, 2).transpose(2, 3).reshape(rows, k)
    assert torch.equal(arrange(x[:, :k]), expected)
    odd = torch.randn(rows, k + 1, device=device).bfloat16()[:, 1:]
    assert torch.equal(arrange(odd), arrange(odd.contiguous()))


def test_many_rows_float32_and_odd_columns(device):
    check(torch.randn(300, 64, device=device).half(), quantize(8, 64, device))
    check(torch.randn(6, 64, device=device), quantize(8, 64, device))
    check(torch.randn(2, 40, device=device), quantize(8, 40, device))


def test_shapes_and_strides(device):
    weight = quantize(24, 128, device)
    x = torch.randn(2, 3, 140, device=device, dtype=torch.float16)[..., :128]
    check(x, weight)
    check(torch.randn(128, 3, device=device, dtype=torch.float16).T, weight)
    check(torch.randn(128, device=device, dtype=torch.float16), weight)
    assert nf4_linear(x[:0], weight).shape == (0, 3, 24)


def test_gradient(device):
    weight = quantize(24, 128, device)
    x = torch.randn(3, 128, device=device, requires_grad=True)
    nf4_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, dequantize_nf4_reference(weight, torch.float32).sum(0).expand(3, 128))


def test_bad_input(device):
    weight = quantize(24, 128, device)
    with pytest.raises(ConfigError, match="does not fit the weight"):
        nf4_linear(torch.randn(3, 64, device=device), weight)
    with pytest.raises(ConfigError, match="does not fit the weight"):
        nf4_linear(torch.randn(3, 128, device="meta"), weight)
    with pytest.raises(ConfigError, match="not floating point"):
        nf4_linear(torch.ones(3, 128, device=device, dtype=torch.int64), weight)
