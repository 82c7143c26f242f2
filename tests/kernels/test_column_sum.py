import pytest
import torch

from unsloth.kernels.column_sum import column_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (130, 70), (0, 5), (4, 0)])
def test_equals_the_formula(device, shape, dtype):
    x = torch.randn(shape, device=device)
    got, truth = column_sum(x, dtype), x.double().sum(0)
    assert got.dtype == dtype and got.shape == truth.shape
    bound = (torch.finfo(dtype).eps + shape[0] * 2**-24) * x.double().abs().sum(0)
    assert ((got.double() - truth).abs() <= bound).all()


def test_written_twice(device):
    x, wide = torch.randn(5, 6 * 7, device=device), torch.full((6, 10), 9.0, device=device, dtype=torch.bfloat16)
    for rows in (5, 0):
        got = column_sum(x[:rows], torch.bfloat16, also=wide[:, 2:9])
        assert torch.equal(wide[:, 2:9], got.view(6, 7)) and (wide[:, :2] == 9).all() and (wide[:, 9:] == 9).all()


def test_strided_rows(device):
    x = torch.randn(9, 40, device=device)
    torch.testing.assert_close(column_sum(x[:, 3:20], torch.float32), x[:, 3:20].sum(0))
    torch.testing.assert_close(column_sum(x.T, torch.float32), x.sum(1))
