import pytest
import torch
from check_op import check_op

from unsloth.core.errors import ConfigError
from unsloth.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from unsloth.kernels.rope import RopeTables, rope_tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(device, b=2, h=3, hk=1, t=5, d=16, dtype=torch.float32, train_weights=True):
    q, k = ((3 * torch.randn(b, t, n, d, device=device)).to(dtype).transpose(1, 2) for n in (h, hk))
    weights = [torch.randn(d, device=device).to(dtype).requires_grad_(train_weights) for _ in range(2)]
    return q.requires_grad_(), k.requires_grad_(), *weights


def tables(device, rows, r):
    inv_freq = 10000.0 ** (-torch.arange(0, r, 2, device=device).float() / r)
    return rope_tables(inv_freq, torch.arange(rows, device=device), 1.2)


def check(args, cos, sin, eps=1e-6, offset=0.0, **options):
    checked = RopeTables.check(
        *args[:2], cos, sin, options.get("positions"), options.get("rotary_dim"), options.get("interleaved", False)
    )
    check_op(
        lambda *a: qk_norm_rope(*a, cos, sin, eps, offset=offset, **options),
        lambda *a: qk_norm_rope_reference(*a, checked, eps, offset),
        *args,
        names=("q", "k", "q_weight", "k_weight"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("b", "h", "hk", "t", "d", "r"), [(1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 16, 16), (1, 5, 2, 7, 80, 32)]
)
def test_output_and_gradients(device, b, h, hk, t, d, r, interleaved, dtype):
    check(inputs(device, b, h, hk, t, d, dtype), *tables(device, t, r), rotary_dim=r, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_weights_gemma_offset_and_packed_positions(device, dtype):
    args = inputs(device, t=7, dtype=dtype, train_weights=False)
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 8], device=device)
    check(args, *tables(device, 9, 16), 1e-5, 1.0, positions=positions, rotary_dim=16)


def test_many_tiles(device):
    check(inputs(device, b=1, h=4, hk=2, t=150, d=64), *tables(device, 150, 64), rotary_dim=64)


def test_in_place(device):
    q, k, wq, wk = (x.detach() for x in inputs(device))
    cos, sin = tables(device, 5, 16)
    expected = qk_norm_rope(q, k, wq, wk, cos, sin, rotary_dim=16)
    got = qk_norm_rope(q, k, wq, wk, cos, sin, rotary_dim=16, inplace=True)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1]) and got[0].data_ptr() == q.data_ptr()


def test_empty(device):
    cos, sin = tables(device, 4, 16)
    check(inputs(device, b=0, t=4), cos, sin, rotary_dim=16)
    check(inputs(device, t=0), cos[:0], sin[:0], rotary_dim=16)


def test_bad_input(device):
    q, k, wq, wk = inputs(device)
    cos, sin = tables(device, 5, 16)
    with pytest.raises(ConfigError, match="k_weight has the wrong shape"):
        qk_norm_rope(q, k, wq, wk[:8], cos, sin, rotary_dim=16)
    with pytest.raises(ConfigError, match="inplace would lose"):
        qk_norm_rope(q, k, wq, wk, cos, sin, rotary_dim=16, inplace=True)
    with pytest.raises(ConfigError, match="not floating point"):
        qk_norm_rope(q, k, wq.int(), wk, cos, sin, rotary_dim=16)
    slow = qk_norm_rope(q, k, wq, wk, cos, sin, rotary_dim=16, fast=False)
    torch.testing.assert_close(slow, qk_norm_rope(q, k, wq, wk, cos, sin, rotary_dim=16))
