import pytest
import torch
from check_op import check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.lora_mlp import lora_mlp, lora_mlp_reference
from unsloth.kernels.lora_weights import Adapter, PaddedWeight

FORMS = ["plain", "padded", "shared buffer"]
SCALES = (0.5, 2.0, 1.5)


def make(device, tokens=9, features=24, inner=40, ranks=(4, 3, 5), dtype=torch.float32):
    """x, the three weights and (a, b) of gate, up, down."""
    x = torch.randn(tokens, features, device=device).to(dtype).requires_grad_()
    shapes = [(inner, features), (inner, features), (features, inner)]
    weights = [(torch.randn(*s, device=device) / s[1] ** 0.5).to(dtype) for s in shapes]
    pairs = []
    for (out, k), rank in zip(shapes, ranks, strict=True):
        pairs.append((torch.randn(rank, k, device=device) / k**0.5).requires_grad_())
        pairs.append(torch.randn(out, rank, device=device).requires_grad_())
    return x, weights, pairs


def shape_weights(weights, form, ranks):
    """(gate_up, down) in one of the accepted forms."""
    if form == "plain":
        return weights[:2], weights[2]
    gate_up = PaddedWeight.from_dense(weights[:2], ranks[0] + ranks[1])
    down = PaddedWeight.from_dense(weights[2:], ranks[2])
    if form == "padded":
        return gate_up, down
    shared = torch.empty(
        max(gate_up.buffer.numel(), down.buffer.numel()), dtype=gate_up.buffer.dtype, device=weights[0].device
    )

    def yielding(padded):
        buffer = shared[: padded.buffer.numel()].view(padded.buffer.shape)
        buffer.copy_(padded.buffer)
        return PaddedWeight(buffer, padded.outs, padded.room)

    return (lambda: yielding(gate_up)), (lambda: yielding(down))


def both(weights, form, ranks, activation="silu", absent=()):
    """(ours, reference) as functions of (x, a_gate, b_gate, ...); ``absent`` linears have no adapter."""
    gate_up, down = shape_weights(weights, form, ranks)

    def adapters(pairs):
        pairs = list(pairs)
        return [None if i in absent else Adapter(pairs.pop(0), pairs.pop(0), SCALES[i]) for i in range(3)]

    def ours(x, *pairs):
        return lora_mlp(x, gate_up, down, adapters(pairs), activation)

    def reference(x, *pairs):
        dense = [w.to(x.dtype) for w in weights]
        return lora_mlp_reference(x, dense[:2], dense[2], adapters(pairs), activation)

    return ours, reference


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forms(device, form, dtype):
    x, weights, pairs = make(device, dtype=dtype)
    check_op(*both(weights, form, (4, 3, 5)), x, *pairs)


@pytest.mark.parametrize("form", ["plain", "padded"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(device, form, activation):
    x, weights, pairs = make(device)
    check_op(*both(weights, form, (4, 3, 5), activation), x, *pairs)


@pytest.mark.parametrize("form", ["plain", "padded"])
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_without_one_adapter(device, form, absent):
    x, weights, pairs = make(device)
    del pairs[2 * absent : 2 * absent + 2]
    check_op(*both(weights, form, (4, 3, 5), absent=(absent,)), x, *pairs)


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_ranks_too_wide_for_the_fused_pass(device, form):
    x, weights, pairs = make(device, ranks=(70, 16, 72))
    check_op(*both(weights, form, (70, 16, 72)), x, *pairs)


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_layouts_batches_and_empty(device, form):
    x, weights, pairs = make(device, tokens=30)
    check = both(weights, form, (4, 3, 5))
    for name, view in layouts(x).items():
        check_op(*check, view, *pairs, names=[name])
    check_op(*check, x.detach().view(2, 15, 24).requires_grad_(), *pairs)
    check_op(*check, x[:0].detach().requires_grad_(), *pairs)
    pairs[4].requires_grad_(False)
    check_op(*check, x.detach(), *pairs)


def test_autocast_keeps_master_gradients(device):
    x, weights, pairs = make(device, dtype=torch.bfloat16)
    ours, _ = both(weights, "padded", (4, 3, 5))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ours(x.float(), *pairs)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.float().square().sum(), pairs)} == {torch.float32}


def test_bad_input(device):
    x, weights, pairs = make(device)
    adapters = [Adapter(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    with pytest.raises(ConfigError, match="three linears"):
        lora_mlp(x, weights[:2], weights[2], adapters[:2])
    with pytest.raises(ConfigError, match="activation"):
        lora_mlp(x, weights[:2], weights[2], adapters, "relu")
    with pytest.raises(ConfigError, match="lora_mlp down"):
        lora_mlp(x, weights[:2], weights[2][:, :8], [None, None, None])
    with pytest.raises(ConfigError, match="does not fit the input"):
        lora_mlp(x[:, :3], weights[:2], weights[2], adapters)
