import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.glu_adapters import gated_activation_reference, glu_backward, glu_forward


def forward_reference(gate_up, activation, a):
    e, u = gate_up.chunk(2, dim=1)
    h = gated_activation_reference(e, u, activation)
    return [h, h @ a.t()]


def backward_reference(dh, gate_up, activation, p, t):
    with torch.enable_grad():
        e, u = (x.detach().requires_grad_() for x in gate_up.chunk(2, dim=1))
        h = gated_activation_reference(e, u, activation)
        de, du = torch.autograd.grad(h, (e, u), dh)
    return [torch.cat([de, du], 1), p.t() @ h.detach(), de.t() @ t[0], du.t() @ t[1]]


def compare(ours, plain, truth):
    for i, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_close(o, p, t, f"result {i}")


def double(x):
    return tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (35, 70, 5), (4, 129, 100), (3, 20, 0)])
def test_values(device, activation, dtype, shape):
    m, features, rank = shape
    gate_up, a, dh, p, tg, tu = (
        torch.randn(*s, device=device).to(dtype)
        for s in [(m, 2 * features), (rank, features), (m, features), (m, rank), (m, rank), (m, rank)]
    )
    wide = gate_up.new_full((m, features + rank + 8), float("nan"))
    h, tail = wide[:, :features], wide[:, features : features + rank]
    kept = glu_forward(gate_up, activation, a, h, tail)
    assert torch.equal(kept, tail) and (not rank or kept.data_ptr() != tail.data_ptr())
    assert wide[:, features + rank :].isnan().all()
    compare(
        [h, tail],
        forward_reference(gate_up, activation, a),
        forward_reference(gate_up.double(), activation, a.double()),
    )
    out = gate_up.new_full((m, 2 * features + 8), float("nan"))
    sums = glu_backward(dh, gate_up, activation, p, (tg, tu), out[:, : 2 * features])
    assert out[:, 2 * features :].isnan().all()
    inputs = (dh, gate_up), (p, (tg, tu))
    plain = backward_reference(*inputs[0], activation, *inputs[1])
    truth = backward_reference(*map(double, inputs[0]), activation, *map(double, inputs[1]))
    # The sums are float32 made of 16-bit h, de and du: their error is that of the inputs' dtype.
    compare([out[:, : 2 * features], *(s.to(dtype) for s in sums)], plain, truth)


def test_rows_shared_among_programs(device):
    gate_up, dh = torch.randn(300, 32, device=device), torch.randn(300, 16, device=device)
    p, tg, tu = (torch.randn(300, r, device=device) for r in (4, 3, 3))
    out = torch.empty_like(gate_up)
    ours = [out, *glu_backward(dh, gate_up, "silu", p, (tg, tu), out, (0.5, 3.0))]
    truth = backward_reference(dh.double(), gate_up.double(), "silu", p.double(), (tg.double(), tu.double()))
    truth = [*truth[:2], 0.5 * truth[2], 3.0 * truth[3]]
    for o, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(o.double(), t, rtol=1e-5, atol=1e-4)


def test_empty_and_unknown(device):
    nothing = torch.empty(0, 8, device=device)
    glu_forward(nothing, "silu", torch.randn(2, 4, device=device), nothing[:, :4], nothing[:, :2])
    sums = glu_backward(nothing[:, :4], nothing, "silu", nothing[:, :2], (nothing[:, :2],) * 2, nothing)
    assert [tuple(s.shape) for s in sums] == [(2, 4), (4, 2), (4, 2)] and not any(s.any() for s in sums)
    with pytest.raises(ConfigError, match="activation"):
        glu_forward(nothing, "relu", nothing, nothing, nothing)
