import pytest
import torch
from check_op import check_op

from unsloth.core.errors import ConfigError
from unsloth.kernels.varlen_attention import Keys, choose_backend, varlen_attention, varlen_attention_reference


def make(device, lengths=(5, 1, 0, 11), heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, h, dim, device=device).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return q * 2, k, v, bounds


def check(q, k, v, bounds, **kwargs):
    extra = {n: x for n, x in kwargs.items() if n != "backend"}
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    check_op(
        lambda q, k, v, b: varlen_attention(q, k, v, b, **kwargs),
        lambda q, k, v, b: varlen_attention_reference(q, k, v, b, **extra),
        q,
        k,
        v,
        bounds,
    )


def test_each_document_alone_equals_torch(device):
    q, k, v, bounds = make(device)
    ours = varlen_attention_reference(q, k, v, bounds)
    alone = [t[6:].transpose(0, 1)[None] for t in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours[6:], plain[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_backend(device, dtype):
    check(*make(device, dtype=dtype), scale=0.3)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_named_backends(device, backend):
    check(*make(device), backend=backend)


def with_more_keys(device, dtype=torch.float32, heads=4, kv_heads=2, dim=16, scale=1):
    """Documents of 3, 0 and 11 queries (times ``scale``) that are the last of 7, 0 and 11 keys."""
    q, _, _, bounds = make(device, (3 * scale, 0, 11 * scale), heads, kv_heads, dim, dtype)
    _, k, v, key_bounds = make(device, (7 * scale, 0, 11 * scale), heads, kv_heads, dim, dtype)
    return q, k, v, bounds, Keys(key_bounds, 11 * scale)


def test_queries_are_the_last_of_more_keys(device):
    q, k, v, bounds, keys = with_more_keys(device)
    ours = varlen_attention_reference(q, k, v, bounds, keys=keys, window=6)
    position = torch.arange(7, device=device)
    gap = position[4:, None] - position
    alone = [t[None].transpose(1, 2) for t in (q[:3], k[:7], v[:7])]
    mask = (gap >= 0) & (gap < 6)
    plain = torch.nn.functional.scaled_dot_product_attention(*alone, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours[:3], plain[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    *given, keys = with_more_keys(device)
    check(*given, keys=keys, backend="sdpa")
    with pytest.raises(ConfigError, match="lacks"):
        varlen_attention(*given, keys=keys, backend="flex")
    with pytest.raises(ConfigError, match="different documents"):
        varlen_attention(*given, keys=Keys(keys.cu_seqlens[:-1], 11))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [0, 33])
def test_gpu_backend_with_more_keys(device, window):
    *given, keys = with_more_keys(device, torch.bfloat16, 8, 2, 64, scale=17)
    check(*given, keys=keys, backend="torch", window=window)


@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 2.0}, {"sinks": True}, {"window": 4, "sinks": True}])
def test_reference_of_each_option_differs_from_plain(device, options):
    q, k, v, bounds = make(device)
    if options.get("sinks"):
        options = {**options, "sinks": torch.randn(4, device=device)}
    ours = varlen_attention(q, k, v, bounds, **options)
    torch.testing.assert_close(ours, varlen_attention_reference(q, k, v, bounds, **options), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours, varlen_attention_reference(q, k, v, bounds), atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_gpu_backends(device, backend):
    inputs = make(device, (70, 1, 129), 8, 2, 64, torch.bfloat16)
    check(*inputs, backend=backend)
    if backend == "flex":
        check(*inputs, backend=backend, window=40, softcap=5.0, sinks=torch.randn(8, device=device))


def test_choice(device):
    q = torch.empty(1, 2, 64)
    assert choose_backend(q) == "sdpa"
    assert choose_backend(q, window=4) == choose_backend(q, softcap=1.0) == choose_backend(q, sinks=True) == "reference"
    assert choose_backend(q.double()) == "reference"


def test_empty_and_bad_input(device):
    q, k, v, bounds = make(device)
    assert varlen_attention(q[:0], k[:0], v[:0], bounds[:1]).shape == (0, 4, 16)
    with pytest.raises(ConfigError, match="do not fit"):
        varlen_attention(q[:, :3], k, v, bounds)
    with pytest.raises(ConfigError, match="dtype or device"):
        varlen_attention(q.half(), k, v, bounds)
    with pytest.raises(ConfigError, match="integers"):
        varlen_attention(q, k, v, bounds.float())
    with pytest.raises(ConfigError, match="sink"):
        varlen_attention(q, k, v, bounds, sinks=torch.zeros(3, device=device))
    with pytest.raises(ConfigError, match="negative"):
        varlen_attention(q, k, v, bounds, window=-1)
    with pytest.raises(ConfigError, match="Unknown attention"):
        varlen_attention(q, k, v, bounds, backend="xformers")
    with pytest.raises(ConfigError, match="lacks"):
        varlen_attention(q, k, v, bounds, backend="sdpa", window=2)
