import pytest
import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.sample_rows import sample_rows, sample_rows_reference, waiting_times


def make(device, rows=5, size=300, dtype=torch.float32):
    raw = (torch.randn(rows, size, device=device) * 3).to(dtype)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.5, 0.3] * rows, device=device)[:rows]
    keys = torch.randint(-(2**31), 2**31 - 1, (2, rows), device=device).to(torch.int32)
    return raw, temperature, keys


def check(raw, adjusted, temperature, bound, keys):
    ours = sample_rows(raw, adjusted, temperature, bound, keys)
    plain = sample_rows_reference(raw, adjusted, temperature, bound, keys)
    assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[1:], plain[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 300, 9001])
def test_equals_the_reference(device, dtype, size):
    raw, temperature, keys = make(device, size=size, dtype=dtype)
    check(raw, raw, temperature, None, keys)


def test_adjusted_logits_and_bounds(device):
    raw, temperature, keys = make(device, size=5000)
    adjusted = raw - torch.randn_like(raw).abs()
    adjusted[:, ::7] = float("-inf")
    bound = (adjusted / temperature.clamp(min=0.1)[:, None]).quantile(0.99, dim=1)
    check(raw, adjusted, temperature, bound, keys)
    token, _, _ = sample_rows(raw, adjusted, temperature, bound, keys)
    z = adjusted.gather(1, token[:, None])[:, 0] / torch.where(temperature == 0, 1, temperature)
    assert bool((z >= bound)[temperature > 0].all())


def test_rows_apart_and_no_rows(device):
    raw, temperature, keys = make(device)
    apart = torch.cat([raw, raw], 1)[:, :300]
    check(apart, raw, temperature, None, keys)
    empty = sample_rows(raw[:0], raw[:0], temperature[:0], None, keys[:, :0])
    assert [tuple(x.shape) for x in empty] == [(0,)] * 3


def test_frequencies_are_the_probabilities(device):
    rows = 4000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0], device=device)
    raw = logits.expand(rows, 5).contiguous()
    keys = torch.stack([torch.arange(rows, device=device), torch.full((rows,), 7, device=device)]).int()
    token, sampled, model = sample_rows_reference(raw, raw, torch.full((rows,), 2.0, device=device), None, keys)
    expected = (logits / 2).softmax(0)
    error = (expected * (1 - expected) / rows).sqrt()
    assert bool(((token.bincount(minlength=5) / rows - expected).abs() < 5 * error).all())
    torch.testing.assert_close(sampled, expected.log()[token])
    torch.testing.assert_close(model, logits.log_softmax(0)[token])


def test_numbers_are_uniform(device):
    u = 1 - torch.exp(-waiting_times(torch.tensor([[5], [9]], dtype=torch.int32, device=device), 100_000)[0].double())
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert abs((u[1:] * u[:-1]).mean() - 0.25) < 0.005


def test_shapes_are_checked(device):
    raw, temperature, keys = make(device)
    with pytest.raises(ConfigError, match="shapes do not fit"):
        sample_rows(raw, raw, temperature, None, keys[0])
