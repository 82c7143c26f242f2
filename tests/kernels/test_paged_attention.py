import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.paged_attention import paged_attention, paged_attention_reference


def make(device, lengths=(1, 70, 0, 33), heads=6, kv_heads=2, dim=24, page=16, dtype=torch.float32):
    """Queries, caches whose unused pages are NaN, a shuffled page table whose unused entries are wild, lengths."""
    most = -(-max(lengths) // page) + 1
    order = torch.randperm(len(lengths) * most + 2)
    q = torch.randn(len(lengths), heads, dim, device=device).to(dtype)
    k, v = torch.full((2, len(order), page, kv_heads, dim), float("nan"), device=device, dtype=dtype)
    table = torch.full((len(lengths), most), 10**6, dtype=torch.int32, device=device)
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            used = min(page, length - i * page)
            table[b, i] = order[b * most + i]
            for cache in (k, v):
                cache[order[b * most + i], :used] = torch.randn(used, kv_heads, dim, device=device).to(dtype)
    return q * 2, k, v, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def check(inputs, **kwargs):
    q, k, v, *rest = inputs
    extra = {n: x for n, x in kwargs.items() if n != "splits"}
    sinks = extra.get("sinks")
    wide = {**extra, "sinks": None if sinks is None else sinks.double()}
    ours = paged_attention(q, k, v, *rest, **kwargs)
    plain = paged_attention_reference(q, k, v, *rest, **extra)
    truth = paged_attention_reference(q.double(), k.double(), v.double(), *rest, **wide)
    assert_close(ours, plain, truth, "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3, None])
def test_plain(device, dtype, splits):
    check(make(device, dtype=dtype), splits=splits)


@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks_caps_and_sinks(device, window, softcap, sinks):
    sink = torch.randn(6, device=device) * 2 if sinks else None
    check(make(device), window=window, softcap=softcap, sinks=sink, splits=2, scale=0.4)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [(1, 1, 1, 1), (5, 5, 80, 8), (20, 1, 64, 32)])
def test_shapes(device, heads, kv_heads, dim, page):
    check(make(device, (5, 37), heads, kv_heads, dim, page))


def test_layouts_and_empty(device):
    q, k, v, table, lengths = make(device)
    check((q.transpose(1, 2).contiguous().transpose(1, 2), k, v, table, lengths.long()))
    swapped = k.transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens in memory
    check((q, swapped, v, table.long(), lengths))
    strided = torch.stack([k, k], dim=-1)[..., 0]
    check((q, strided, v, table, lengths))
    assert paged_attention(q[:0], k, v, table[:0], lengths[:0]).shape == (0, 6, 24)


def test_bad_input(device):
    q, k, v, table, lengths = make(device)
    with pytest.raises(ConfigError, match="do not fit"):
        paged_attention(q[:, :5], k, v, table, lengths)
    with pytest.raises(ConfigError, match="dtype"):
        paged_attention(q.half(), k, v, table, lengths)
    with pytest.raises(ConfigError, match="integers"):
        paged_attention(q, k, v, table.float(), lengths)
    with pytest.raises(ConfigError, match="length a sequence"):
        paged_attention(q, k, v, table, lengths[:2])
    with pytest.raises(ConfigError, match="sink"):
        paged_attention(q, k, v, table, lengths, sinks=torch.zeros(2, device=device))
    with pytest.raises(ConfigError, match="negative"):
        paged_attention(q, k, v, table, lengths, window=-1)
