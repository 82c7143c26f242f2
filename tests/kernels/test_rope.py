import pytest
import torch
from check_op import check_op

from unsloth.core.errors import ConfigError
from unsloth.kernels.rope import RopeTables, rope, rope_reference, rope_tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(device, b=2, h=3, hk=1, t=5, d=16, dtype=torch.float32):
    """q and k in the layout that attention gives them: [B, T, H, D] transposed."""
    q, k = (torch.randn(b, t, n, d, device=device).to(dtype).transpose(1, 2) for n in (h, hk))
    return q.requires_grad_(), k.requires_grad_()


def tables(device, rows, r, factor=1.0, base=10000.0):
    inv_freq = base ** (-torch.arange(0, r, 2, device=device).float() / r)
    return rope_tables(inv_freq, torch.arange(rows, device=device), factor)


def transformers_rope(x, cos, sin):
    """The formula as transformers writes it, with full-width tables."""
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def against_reference(q, k, cos, sin, **options):
    checked = RopeTables.check(
        q, k, cos, sin, options.get("positions"), options.get("rotary_dim"), options.get("interleaved", False)
    )

    def reference(q, k):
        c, s = checked.by_token()
        return tuple(rope_reference(x, c, s, checked.rotary_dim, checked.interleaved) for x in (q, k))

    check_op(lambda q, k: rope(q, k, cos, sin, **options), reference, q, k, names=("q", "k"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("b", "h", "hk", "t", "d", "r"), [(1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 16, 16), (1, 5, 2, 7, 80, 32)]
)
def test_output_and_gradients(device, b, h, hk, t, d, r, interleaved, dtype):
    q, k = heads(device, b, h, hk, t, d, dtype)
    against_reference(q, k, *tables(device, t, r, 1.3), rotary_dim=r, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_full_width_tables_by_batch(device, interleaved):
    q, k = heads(device)
    cos, sin = (x.expand(2, 5, 8) for x in tables(device, 5, 16))
    wide = [x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1) for x in (cos, sin)]
    against_reference(q, k, *wide, interleaved=interleaved)
    if not interleaved:
        got = rope(q, k, *wide)
        for x, y in zip((q, k), got, strict=True):
            torch.testing.assert_close(y, transformers_rope(x, wide[0][:, None], wide[1][:, None]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_positions(device, dtype):
    q, k = heads(device, t=7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 9]], device=device, dtype=dtype)
    cos, sin = tables(device, 10, 16)
    against_reference(q, k, cos, sin, positions=positions, rotary_dim=16)
    shared = rope(q, k, cos, sin, positions=positions[1], rotary_dim=16)
    by_token = rope(q, k, cos[positions[1].long()], sin[positions[1].long()], rotary_dim=16)
    assert all(torch.equal(a, b) for a, b in zip(shared, by_token, strict=True))


@pytest.mark.parametrize("r", [16, 8])
def test_in_place(device, r):
    q, k = heads(device)
    cos, sin = tables(device, 5, r)
    expected = rope(q, k, cos, sin, rotary_dim=r)
    with torch.no_grad():
        q2, k2 = q.detach().clone(), k.detach().clone()
        got = rope(q2, k2, cos, sin, rotary_dim=r, inplace=True)
    assert got[0].data_ptr() == q2.data_ptr() and torch.equal(q2, expected[0]) and torch.equal(k2, expected[1])
    check_op(
        lambda q, k: rope((q * 1).transpose(1, 2), (k * 1).transpose(1, 2), cos, sin, rotary_dim=r, inplace=True),
        lambda q, k: tuple(rope_reference(x.transpose(1, 2), cos[None], sin[None], r) for x in (q, k)),
        q.detach().transpose(1, 2).contiguous().requires_grad_(),
        k.detach().transpose(1, 2).contiguous().requires_grad_(),
    )


def test_one_of_two_gradients(device):
    q, k = heads(device)
    cos, sin = tables(device, 5, 16)
    c, s = cos.expand(2, 5, 8), sin.expand(2, 5, 8)
    for i in range(2):
        check_op(
            lambda q, k, i=i: rope(q, k, cos, sin, rotary_dim=16)[i],
            lambda q, k, i=i: rope_reference((q, k)[i], c, s, 16),
            q,
            k,
        )
    assert rope(q, None, cos, sin, rotary_dim=16)[1] is None


def test_layouts(device):
    cos, sin = tables(device, 5, 16)
    wide = torch.randn(2, 5, 4 * 16 + 3, device=device)
    q = wide[..., : 3 * 16].unflatten(-1, (3, 16)).transpose(1, 2)
    k = torch.randn(2, 1, 16, 5, device=device).transpose(2, 3)
    against_reference(q.requires_grad_(), k.requires_grad_(), cos, sin, rotary_dim=16)


def test_empty(device):
    cos, sin = tables(device, 4, 16)
    q, k = heads(device, b=0, t=4)
    against_reference(q, k, cos, sin, rotary_dim=16)
    q, k = heads(device, t=0)
    against_reference(q, k, cos[:0], sin[:0], rotary_dim=16)


def test_bad_input(device):
    q, k = heads(device)
    cos, sin = tables(device, 5, 16)
    with pytest.raises(ConfigError, match="do not fit"):
        rope(q, k, cos, sin, rotary_dim=12)
    with pytest.raises(ConfigError, match="table has the wrong shape"):
        rope(q, k, cos[:3], sin[:3], rotary_dim=16)
    with pytest.raises(ConfigError, match="k does not fit"):
        rope(q, k.half(), cos, sin, rotary_dim=16)
    with pytest.raises(ConfigError, match="cannot be overwritten"):
        rope(q[:, :1].expand(2, 3, 5, 16), None, cos, sin, rotary_dim=16, inplace=True)
    with pytest.raises(ConfigError, match="batch, heads"):
        rope(q[0], None, cos, sin)
    with pytest.raises(ConfigError, match="positions unusable"):
        rope(q, k, cos, sin, positions=torch.zeros(5, device=device), rotary_dim=16)
    with pytest.raises(ConfigError, match="positions have the wrong shape"):
        rope(q, k, cos, sin, positions=torch.zeros(4, device=device, dtype=torch.int64), rotary_dim=16)
    outside = torch.full((5,), 5, device=device)
    if device.type == "cuda":
        assert rope(q, k, cos, sin, positions=outside, rotary_dim=16)[0].isnan().all()
    else:
        with pytest.raises(ConfigError, match="outside the table"):
            rope(q, k, cos, sin, positions=outside, rotary_dim=16)
    doubled = rope(q.double(), k.double(), cos, sin, rotary_dim=16)
    torch.testing.assert_close(rope(q, k, cos, sin, rotary_dim=16, fast=False)[0].double(), doubled[0])
