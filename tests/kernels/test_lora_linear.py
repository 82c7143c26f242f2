import pytest
import torch
from check_op import check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.lora_linear import lora_linear, lora_linears, lora_linears_reference, lora_qkv
from unsloth.kernels.lora_weights import Adapter, LoraGroup, PaddedWeight

FORMS = ["plain", "callable", "padded", "padded callable"]


def make(device, outs=(24, 8, 8), features=40, ranks=(4, 3, 8), tokens=9, dtype=torch.float32, adapters=torch.float32):
    """x, weights, and (a, b) a linear; B is random, since zeros would hide everything."""
    x = torch.randn(tokens, features, device=device).to(dtype).requires_grad_()
    weights = [(torch.randn(out, features, device=device) / features**0.5).to(dtype) for out in outs]
    pairs = []
    for out, rank in zip(outs, ranks, strict=True):
        pairs.append((torch.randn(rank, features, device=device) / features**0.5).to(adapters).requires_grad_())
        pairs.append(torch.randn(out, rank, device=device).to(adapters).requires_grad_())
    return x, weights, pairs


def shape_weights(weights, form, ranks):
    """The weights in one of the accepted forms."""
    if form == "plain":
        return weights
    if form == "callable":
        return [lambda w=w: w.clone() for w in weights]
    rank = sum(ranks)
    return (
        PaddedWeight.from_dense(weights, rank) if form == "padded" else lambda: PaddedWeight.from_dense(weights, rank)
    )


def both(weights, form, ranks, scales, biases=None):
    """(ours, reference) as functions of (x, a_0, b_0, ...)."""
    ours_weights = shape_weights(weights, form, ranks)

    def adapters(pairs):
        return [Adapter(a, b, s) for a, b, s in zip(pairs[::2], pairs[1::2], scales, strict=True)]

    def ours(x, *pairs):
        return lora_linears(x, ours_weights, adapters(pairs), biases)

    def reference(x, *pairs):
        return lora_linears_reference(x, [w.to(x.dtype) for w in weights], adapters(pairs), biases)

    return ours, reference


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group(device, form, dtype):
    x, weights, pairs = make(device, dtype=dtype)
    check_op(*both(weights, form, (4, 3, 8), (0.5, 2.0, 1.0)), x, *pairs)


@pytest.mark.parametrize("form", FORMS)
def test_one_linear_with_bias(device, form):
    x, weights, pairs = make(device, outs=(17,), ranks=(16,), dtype=torch.float16)
    bias = torch.randn(17, device=device)
    check_op(*both(weights, form, (16,), (2.0,), [bias]), x, *pairs)
    assert lora_linear(x, weights[0], Adapter(*pairs), bias).shape == (9, 17)


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_partly_without_adapters_or_biases(device, form):
    x, weights, pairs = make(device)
    biases = [None, torch.randn(8, device=device), None]
    some = [Adapter(pairs[0], pairs[1], 2.0), None, None]
    shaped = shape_weights(weights, form, (4,))

    def ours(x, a, b):
        return lora_linears(x, shaped, [Adapter(a, b, 2.0), None, None], biases)

    def reference(x, a, b):
        return lora_linears_reference(x, [w.to(x.dtype) for w in weights], [Adapter(a, b, 2.0), None, None], biases)

    check_op(ours, reference, x, pairs[0], pairs[1])
    none = lora_linears(x, shaped, [None] * 3)
    torch.testing.assert_close(none[1], x @ weights[1].t())
    assert some[0].rank == 4


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_layouts_batches_and_empty(device, form):
    x, weights, pairs = make(device, tokens=30)
    check = both(weights, form, (4, 3, 8), (1.0, 1.0, 1.0))
    for name, view in layouts(x).items():
        check_op(*check, view, *pairs, names=[name])
    check_op(*check, x.detach().view(2, 15, 40).requires_grad_(), *pairs)
    check_op(*check, x[:0].detach().requires_grad_(), *pairs)
    check_op(*check, x[0].detach().requires_grad_(), *pairs)
    for view in layouts(pairs[1]).values():
        check_op(*check, x, pairs[0], view, *pairs[2:])


def test_only_what_is_needed(device):
    x, weights, pairs = make(device)
    pairs[0].requires_grad_(False)
    check = both(weights, "padded", (4, 3, 8), (1.0, 1.0, 1.0))
    check_op(*check, x.detach(), *pairs)


@pytest.mark.parametrize("form", ["plain", "padded"])
def test_autocast_keeps_master_gradients(device, form):
    x, weights, pairs = make(device, dtype=torch.bfloat16)
    ours, _ = both(weights, form, (4, 3, 8), (1.0, 1.0, 1.0))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = ours(x.float(), *pairs)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    grads = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), pairs)
    assert {g.dtype for g in grads} == {torch.float32}


def test_outputs_may_be_changed_in_place(device):
    x, weights, pairs = make(device)
    ours, _ = both(weights, "padded", (4, 3, 8), (1.0, 1.0, 1.0))
    q, k, v = ours(x, *pairs)
    q.mul_(2)
    torch.autograd.grad((q.sum() + k.sum() + v.sum()), x)


def test_input_in_a_buffer_already(device):
    x, weights, pairs = make(device)
    buffer = torch.full((9, 56), float("nan"), device=device)
    buffer[:, :40] = x.detach()
    padded = PaddedWeight.from_dense(weights, 15)
    adapters = [Adapter(a, b, 2.0) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    views = buffer[:, :40].requires_grad_()
    detached = buffer[:, :40].detach().requires_grad_()
    results = []
    for given, kept in (
        (x, None),
        (views, buffer),
        (detached, buffer),
        (detached, buffer),
        (x, buffer),
        (views, buffer[:, :50]),
    ):
        outputs = lora_linears(given, padded, adapters, buffer=kept)
        results.append([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [given, *pairs])])
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_changed_adapters_are_seen(device):
    x, weights, pairs = make(device)
    padded = PaddedWeight.from_dense(weights, 15)
    adapters = [Adapter(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    before = lora_linears(x, padded, adapters)
    for change in (lambda p: p.add_(1), lambda p: p.data.add_(1)):  # the second leaves the version counter alone
        with torch.no_grad():
            change(pairs[1])
        after = lora_linears(x, padded, adapters)
        torch.testing.assert_close(after[0], lora_linears(x, weights, adapters)[0])
        assert not torch.allclose(before[0], after[0])
    group = LoraGroup([padded], adapters, torch.float32, again=False)
    assert group.columns == 16 and torch.equal(padded.buffer[40:55, :40], torch.cat(pairs[::2]))


def test_one_weight_under_two_sets_of_adapters(device):
    x, weights, pairs = make(device)
    others = [t.detach().flip(0).requires_grad_() for t in pairs]
    shared = PaddedWeight.from_dense(weights, 15)

    def run(first_weights, second_weights):
        first = lora_linears(x, first_weights, [Adapter(*pairs[i : i + 2], 2.0) for i in (0, 2, 4)])
        lora_linears(x, second_weights, [Adapter(*others[i : i + 2], 0.5) for i in (0, 2, 4)])
        return torch.autograd.grad(sum(y.square().sum() for y in first), [x, *pairs])

    expected = run(PaddedWeight.from_dense(weights, 15), PaddedWeight.from_dense(weights, 15))
    for ours, apart in zip(run(shared, shared), expected, strict=True):
        torch.testing.assert_close(ours, apart)


def test_trained_base_weights_use_the_reference(device):
    x, weights, pairs = make(device)
    weights[0].requires_grad_()
    q, _, _ = lora_qkv(x, weights, [Adapter(*pairs[:2]), None, None])
    assert torch.autograd.grad(q.sum(), weights[0])[0].shape == weights[0].shape


def test_bad_input(device):
    x, weights, pairs = make(device)
    adapters = [Adapter(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    with pytest.raises(ConfigError, match="does not fit the input"):
        lora_linears(x[:, :7], weights, adapters)
    with pytest.raises(ConfigError, match="dtype"):
        lora_linears(x.to(torch.bfloat16), weights, adapters)
    with pytest.raises(ConfigError, match="adapter . does not fit"):
        lora_linears(x, weights, adapters[::-1])
    with pytest.raises(ConfigError, match="too little room"):
        lora_linears(x, PaddedWeight.from_dense(weights, 0), adapters)
    with pytest.raises(ConfigError, match="adapter or None"):
        lora_linears(x, PaddedWeight.from_dense(weights, 16), adapters[:2])
