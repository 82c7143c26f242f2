import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.rope import rope_tables
from unsloth.kernels.rope_to_pages import rope_to_pages, rope_to_pages_reference


def make(device, tokens=5, heads=6, key_heads=2, dim=24, page=4, dtype=torch.float32):
    wide = torch.randn(tokens, heads + 2 * key_heads, dim, device=device).to(dtype)
    q, k, v = wide.split([heads, key_heads, key_heads], 1)
    cos, sin = rope_tables(torch.rand(dim // 2, device=device), torch.arange(50, device=device))
    positions = torch.randint(0, 50, (tokens,), device=device).int()
    places = torch.randperm(7 * page, device=device)[:tokens].int()
    caches = [torch.zeros(7, page, key_heads, dim, device=device, dtype=dtype) for _ in range(2)]
    return [q, k, v, cos.to(dtype), sin.to(dtype), positions, places, *caches]


def run(function, inputs):
    q, *rest, k_cache, v_cache = inputs
    q, k_cache, v_cache = q.clone(), k_cache.clone(), v_cache.clone()
    function(q, *rest, k_cache, v_cache)
    return q, k_cache, v_cache


def check(inputs):
    ours, plain = run(rope_to_pages, inputs), run(rope_to_pages_reference, inputs)
    truth = run(rope_to_pages_reference, [x.double() if x.is_floating_point() else x for x in inputs])
    for ours_i, plain_i, truth_i in zip(ours, plain, truth, strict=True):
        assert_close(ours_i, plain_i, truth_i, "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(device, dtype):
    check(make(device, dtype=dtype))


@pytest.mark.parametrize(("tokens", "heads", "key_heads", "dim"), [(1, 1, 1, 2), (3, 9, 9, 80), (2, 20, 10, 128)])
def test_shapes(device, tokens, heads, key_heads, dim):
    check(make(device, tokens, heads, key_heads, dim))


def test_eight_bits_saturate(device):
    inputs = make(device)
    inputs[2] = inputs[2] * 1000
    inputs[-2:] = [cache.to(torch.float8_e4m3fn) for cache in inputs[-2:]]
    ours, plain = run(rope_to_pages, inputs), run(rope_to_pages_reference, inputs)
    torch.testing.assert_close(ours[0], plain[0])
    if device.type == "cuda":  # the interpreter drops bits where a GPU rounds
        for ours_i, plain_i in zip(ours[1:], plain[1:], strict=True):
            torch.testing.assert_close(ours_i.float(), plain_i.float(), rtol=0.13, atol=1e-2)
    assert ours[2].float().abs().max() == 448


def test_what_does_not_fit(device):
    inputs = make(device)
    inputs[3] = inputs[3][:, :5]
    with pytest.raises(ConfigError, match="do not fit"):
        rope_to_pages(*inputs)
