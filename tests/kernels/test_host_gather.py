import pytest
import torch

from unsloth.kernels.host_gather import host_gather, host_gather_reference


def pinned(weight, device):
    """Kernels on a GPU read host memory only if it is pinned."""
    return weight.pin_memory() if torch.device(device).type == "cuda" else weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (1, 1), (300, 5000), (7, 33)])
def test_rows_to_the_bit(device, shape, dtype):
    weight = pinned(torch.randn(shape).to(dtype), device)
    ids = torch.randint(0, shape[0], (2, 3), device=device)
    found = host_gather(weight, ids)
    assert found.shape == (2, 3, shape[1]) and found.device == ids.device
    assert torch.equal(found, host_gather_reference(weight, ids))
    assert torch.equal(found.cpu(), weight[ids.cpu()])


def test_ids_of_other_kinds(device):
    weight = pinned(torch.randn(9, 8), device)
    ids = torch.arange(8, dtype=torch.int32, device=device)[::2]
    assert torch.equal(host_gather(weight, ids).cpu(), weight[::2][:4])
    assert host_gather(weight, ids[:0]).shape == (0, 8)


def test_ids_outside_are_nan_not_other_memory(device):
    weight = pinned(torch.randn(4, 8), device)
    found = host_gather(weight, torch.tensor([1, 4, -1], device=device))
    assert torch.equal(found[0].cpu(), weight[1]) and found[1:].isnan().all()
