import pytest
import torch

from unsloth.kernels.cut_rows import cut_rows, cut_rows_reference


def make(device, rows=6, size=300, dtype=torch.float32):
    logits = (torch.randn(rows, size, device=device) * 3).to(dtype)
    temperature = torch.tensor([0.7, 1.0, 1.5, 0.3, 1.0, 0.0], device=device)[:rows]
    top_k = torch.tensor([0, 5, 20, 1, 400, 7], dtype=torch.int32, device=device)[:rows]
    top_p = torch.tensor([0.8, 1.0, 0.5, 0.9, 0.95, 0.3], device=device)[:rows]
    min_p = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.02, 0.0], device=device)[:rows]
    return logits, temperature, top_k, top_p, min_p


def kept(inputs, bound):
    z = inputs[0].float() * (1 / torch.where(inputs[1] == 0, 1.0, inputs[1]))[:, None]
    return z >= bound[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 300, 9000])
def test_keeps_what_the_reference_keeps(device, dtype, size):
    inputs = make(device, size=size, dtype=dtype)
    ours, plain = kept(inputs, cut_rows(*inputs)), kept(inputs, cut_rows_reference(*inputs))
    assert torch.equal(ours, plain)
    assert bool(ours.any(1).all())


def test_nothing_is_cut_where_nothing_is_asked_for(device):
    logits, temperature, *_ = make(device)
    nothing = (torch.zeros(6, device=device).int(), torch.ones(6, device=device), torch.zeros(6, device=device))
    assert bool(kept((logits, temperature), cut_rows(logits, temperature, *nothing)).all())


def test_forbidden_tokens_and_rows_apart(device):
    inputs = make(device)
    inputs[0][:, ::3] = float("-inf")
    inputs[0][2, 10:] = float("-inf")  # fewer than are to be kept
    assert torch.equal(kept(inputs, cut_rows(*inputs)), kept(inputs, cut_rows_reference(*inputs)))
    apart = (torch.cat([inputs[0], inputs[0]], 1)[:, :300], *inputs[1:])
    assert torch.equal(cut_rows(*apart), cut_rows(*inputs))


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_heavy_and_light_tails(device, spread):
    torch.manual_seed(3)
    logits = (torch.randn(6, 9000, device=device) * spread).bfloat16()  # many equal ones
    ones = torch.ones(6, device=device)
    top_k = torch.tensor([0, 6000, 1, 0, 50, 8999], dtype=torch.int32, device=device)
    top_p = torch.tensor([0.5, 1.0, 0.9, 0.99995, 0.95, 0.999], device=device)
    inputs = logits, ones, top_k, top_p, 0 * ones
    ours, plain = kept(inputs, cut_rows(*inputs)), kept(inputs, cut_rows_reference(*inputs))
    assert (ours != plain).sum() == 0
