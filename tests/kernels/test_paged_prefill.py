import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.paged_prefill import make_tiles, paged_prefill, paged_prefill_reference


def make(device, spans=((1, 0), (40, 0), (5, 30), (33, 7)), heads=6, kv_heads=2, dim=24, page=16, dtype=torch.float32):
    """Queries, caches whose unused places are NaN, a shuffled page table with wild unused entries, tiles."""
    most = max(-(-(count + start) // page) for count, start in spans) + 1
    order = torch.randperm(len(spans) * most + 2)
    q = torch.randn(sum(count for count, _ in spans), heads, dim, device=device).to(dtype) * 2
    k, v = torch.full((2, len(order), page, kv_heads, dim), float("nan"), device=device, dtype=dtype)
    table = torch.full((len(spans), most), 10**6, dtype=torch.int32, device=device)
    for b, (count, start) in enumerate(spans):
        length = count + start
        for i in range(-(-length // page)):
            used = min(page, length - i * page)
            table[b, i] = order[b * most + i]
            for cache in (k, v):
                cache[order[b * most + i], :used] = torch.randn(used, kv_heads, dim, device=device).to(dtype)
    return q, k, v, table, make_tiles(spans).to(device)


def check(inputs, **kwargs):
    q, k, v, *rest = inputs
    kwargs = {"scale": q.shape[2] ** -0.5, **kwargs}
    ours = paged_prefill(q, k, v, *rest, **kwargs)
    plain = paged_prefill_reference(q, k, v, *rest, **kwargs)
    truth = paged_prefill_reference(q.double(), k.double(), v.double(), *rest, **kwargs)
    assert_close(ours, plain, truth, "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain(device, dtype):
    check(make(device, dtype=dtype))


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_windows_and_caps(device, window, softcap):
    check(make(device), window=window, softcap=softcap, scale=0.4)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [(1, 1, 1, 1), (5, 5, 80, 8), (20, 2, 64, 32)])
def test_shapes(device, heads, kv_heads, dim, page):
    check(make(device, ((3, 4), (20, 0)), heads, kv_heads, dim, page))


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_keys_that_all_tokens_of_a_tile_see(device, page, softcap):
    check(make(device, ((20, 63), (3, 64), (17, 200), (70, 0)), page=page), softcap=softcap)


def test_layouts_eight_bits_and_nothing(device):
    q, k, v, table, tiles = make(device)
    check(
        (
            q.transpose(0, 2).contiguous().transpose(0, 2),
            k.transpose(1, 2).contiguous().transpose(1, 2),
            v,
            table,
            tiles,
        )
    )
    small_k, small_v = (c.to(torch.float8_e4m3fn) for c in (k, v))
    ours = paged_prefill(q, small_k, small_v, table, tiles, scale=0.2)
    wide = paged_prefill_reference(q, small_k.float(), small_v.float(), table, tiles, scale=0.2)
    torch.testing.assert_close(ours, wide, rtol=1e-5, atol=1e-5)
    empty = make_tiles([]).to(device)
    assert paged_prefill(q[:0], k, v, table[:0], empty, scale=1.0).shape == (0, 6, 24)


def test_what_does_not_fit(device):
    q, k, v, table, tiles = make(device)
    with pytest.raises(ConfigError, match="do not fit"):
        paged_prefill(q[:, :5], k, v, table, tiles, scale=1.0)
    with pytest.raises(ConfigError, match="differ in dtype"):
        paged_prefill(q, k.half(), v.half(), table, tiles, scale=1.0)
