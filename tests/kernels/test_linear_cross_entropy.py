import pytest
import torch
from check_op import check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels import head_chunks
from unsloth.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from unsloth.kernels.softmax_rows import HeadOptions

EVERYTHING = HeadOptions(logit_scale=0.7, softcap=4.0, temperature=1.3, label_smoothing=0.1, z_loss=1e-2)


def make(device, tokens, hidden, vocabulary, dtype=torch.float32, trained=True, ignored=0.3):
    """Hidden states, weight, labels; logits spread wide enough for caps and smoothing to bite."""
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    w = (torch.randn(vocabulary, hidden, device=device) * 3 / hidden**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[torch.rand(tokens, device=device) < ignored] = -100
    return x.requires_grad_(), w.requires_grad_(trained), labels


def both(options=None, **kwargs):
    """(ours, reference) as functions of tensors."""
    shared = {k: v for k, v in kwargs.items() if k == "num_items"}
    return (
        lambda *t: linear_cross_entropy(*t, options=options, **kwargs),
        lambda *t: linear_cross_entropy_reference(*t, options=options, **shared),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_plain(device, dtype, trained):
    check_op(*both(), *make(device, 13, 24, 301, dtype, trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_and_bias(device, dtype):
    x, w, labels = make(device, 11, 16, 77, dtype)
    bias = torch.randn(77, device=device).to(dtype).requires_grad_()
    check_op(*both(EVERYTHING, num_items=5), x, w, labels, bias)


@pytest.mark.parametrize(
    "options",
    [
        HeadOptions(softcap=2.0),
        HeadOptions(logit_scale=0.25),
        HeadOptions(temperature=0.5),
        HeadOptions(label_smoothing=0.2),
        HeadOptions(z_loss=0.1),
        HeadOptions(ignore_index=3),
    ],
    ids=["softcap", "scale", "temperature", "smoothing", "z_loss", "ignore_index"],
)
def test_each_option_matters(device, options):
    x, w, labels = make(device, 9, 8, 40, ignored=0)
    labels[:4] = 3
    check_op(*both(options), x, w, labels)
    assert not torch.isclose(linear_cross_entropy(x, w, labels, options=options), linear_cross_entropy(x, w, labels))


def test_several_chunks_and_tiles(device):
    x, w, labels = make(device, 300, 8, 33)
    check_op(*both(chunk_bytes=1), x, w, labels)  # three chunks of 128 rows at most
    check_op(*both(), *make(device, 3, 8, 9001))  # two tiles of the vocabulary


def test_dropping_ignored_rows_changes_nothing(device):
    check_op(*both(drop_ignored=True), *make(device, 20, 8, 33, ignored=0.6))


LATE = [
    HeadOptions(),
    HeadOptions(logit_scale=0.7, softcap=4.0, temperature=1.3),
    HeadOptions(ignore_index=3),
    HeadOptions(label_smoothing=0.1),
]


@pytest.mark.parametrize("options", LATE, ids=["plain", "transformed", "ignore_index", "not-late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_gradient_can_wait_for_the_backward(device, dtype, options, monkeypatch):
    monkeypatch.setattr(head_chunks, "COLUMN_STEP", 16)  # five slices of the vocabulary
    x, w, labels = make(device, 11, 24, 77, dtype, ignored=0.3 if options.ignore_index < 0 else 0)
    labels[:3] = torch.tensor([0, 3, 76])
    bias = torch.randn(77, device=device).to(dtype).requires_grad_()
    for inputs in ((x, w, labels, bias), (x, w, labels), (x.detach(), w, labels)):
        check_op(*both(options, num_items=5, late_weight=True, chunk_bytes=1), *inputs)


def test_a_waiting_gradient_shows_a_bad_label_and_none_to_learn(device):
    x, w, labels = make(device, 5, 8, 33, ignored=0)
    nothing = linear_cross_entropy(x, w, torch.full_like(labels, -100), late_weight=True)
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(nothing, [x, w]))
    empty = linear_cross_entropy(x[:0], w, labels[:0], late_weight=True)
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(empty, [x, w]))
    labels[1] = 33
    assert torch.autograd.grad(linear_cross_entropy(x, w, labels, late_weight=True), w)[0].isnan().all()


def test_layouts_and_batches(device):
    x, w, labels = make(device, 6, 16, 33)
    for name, view in layouts(x).items():
        check_op(*both(), view, w, labels, names=[name])
    for name, view in layouts(w).items():
        check_op(*both(), x, view, labels, names=["", name])
    check_op(*both(), x.detach().view(2, 3, 16).requires_grad_(), w, labels.view(2, 3))
    check_op(*both(), x, w, labels.int())


def test_nothing_to_learn_is_zero(device):
    x, w, labels = make(device, 5, 8, 33)
    empty = linear_cross_entropy(x[:0], w, labels[:0])
    ignored = linear_cross_entropy(x, w, torch.full_like(labels, -100))
    for loss in (empty, ignored):
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [x, w])
        assert all(g.abs().sum() == 0 for g in grads)


def test_normalization(device):
    x, w, labels = make(device, 12, 8, 33)
    mean, total = linear_cross_entropy(x, w, labels), linear_cross_entropy(x, w, labels, num_items=1)
    count = (labels != -100).sum()
    torch.testing.assert_close(mean * count, total)
    torch.testing.assert_close(linear_cross_entropy(x, w, labels, num_items=count), mean)


def test_extreme_logits(device):
    x, w, labels = make(device, 6, 8, 50, ignored=0)
    check_op(*both(), (x.detach() * 1e4).requires_grad_(), w, labels)
    check_op(*both(HeadOptions(softcap=5.0)), (x.detach() * 1e4).requires_grad_(), w, labels)


def test_a_bad_label_is_visible(device):
    x, w, labels = make(device, 4, 8, 33, ignored=0)
    for bad in (33, -1):
        labels[1] = bad
        loss = linear_cross_entropy(x, w, labels)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0][1].isnan().all()


def test_autocast_and_master_weights(device):
    x, w, labels = make(device, 9, 16, 65)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check = linear_cross_entropy(x, w, labels)
        grads = torch.autograd.grad(check, [x, w])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    exact = torch.autograd.grad(linear_cross_entropy_reference(x, w, labels), [x, w])
    for ours, truth in zip(grads, exact, strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()


def test_no_gradient_needed(device):
    x, w, labels = make(device, 5, 8, 33)
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, labels).requires_grad
    loss = linear_cross_entropy(x, w, labels)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_bad_input(device):
    x, w, labels = make(device, 4, 8, 33)
    with pytest.raises(ConfigError, match="do not fit"):
        linear_cross_entropy(x, w[:, :7], labels)
    with pytest.raises(ConfigError, match="label"):
        linear_cross_entropy(x, w, labels[:3])
    with pytest.raises(ConfigError, match="label"):
        linear_cross_entropy(x, w, labels.float())
    with pytest.raises(ConfigError, match="floating"):
        linear_cross_entropy(x, w.detach().to(torch.uint8), labels)
    with pytest.raises(ConfigError, match="bias"):
        linear_cross_entropy(x, w, labels, w[0])
    with pytest.raises(ConfigError, match="several devices"):
        linear_cross_entropy(x, w.to("meta"), labels)
    for bad in ({"temperature": 0.0}, {"softcap": -1.0}, {"label_smoothing": 1.0}, {"z_loss": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            HeadOptions(**bad)
