"""Lazy logits behave as the logits that they stand for."""

import copy
import io

import numpy as np
import pytest
import torch

from unsloth.core.errors import TrainingError
from unsloth.layers.lazy_logits import LazyLogits, Origin


@pytest.fixture
def pair():
    """Lazy logits (2, 5, 7), and the real ones."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 7)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    return LazyLogits(Origin(hidden, linear, linear.forward)), linear(hidden)


RECORDED = {
    "times": lambda x: x * 3,
    "from the left": lambda x: 0.5 * x,
    "divided": lambda x: x / 4.0,
    "cap": lambda x: torch.tanh(x / 2.0) * 2.0,
    "cap of scaled": lambda x: (x * 3).div(2.0).tanh().mul(2.0),
    "float": lambda x: x.float() * 2,
    "contiguous": lambda x: x.contiguous(),
}
COMPUTED = {
    "plus": lambda x: x + 1,
    "by a tensor": lambda x: x * torch.arange(7.0),
    "a number over it": lambda x: 1.0 / x,
    "slice": lambda x: x[:, :-1, :3],
    "view": lambda x: x.view(-1, 7),
    "dtype": lambda x: x.to(torch.float64),
    "argmax": lambda x: x.argmax(-1),
    "function": lambda x: torch.nn.functional.log_softmax(x, -1),
    "list of them": lambda x: torch.cat([x, x]),
    "keyword": lambda x: torch.sum(input=x, dim=-1),
    "detach": lambda x: x.detach(),
    "in place": lambda x: x.mul_(2),
}


@pytest.mark.parametrize("operation", RECORDED.values(), ids=RECORDED)
def test_scales_and_caps_are_remembered(pair, operation):
    lazy, real = pair
    result = operation(lazy)
    assert isinstance(result, LazyLogits) and result.is_pending and lazy.is_pending
    assert torch.equal(result.materialize(), operation(real))
    scale, cap = result.scale_and_cap()
    expected = cap * torch.tanh(scale * real / cap) if cap else scale * real
    torch.testing.assert_close(expected, operation(real))


@pytest.mark.parametrize("operation", COMPUTED.values(), ids=COMPUTED)
def test_everything_else_computes_them(pair, operation):
    lazy, real = pair
    result = operation(lazy)
    assert type(result) is torch.Tensor
    assert torch.equal(result, operation(real.clone()))


def test_what_is_no_scale_and_cap_is_said(pair):
    lazy, _ = pair
    assert torch.tanh(torch.tanh(lazy)).scale_and_cap() is None
    assert (torch.tanh(lazy) * -2).scale_and_cap() is None


def test_shape_and_dtype_are_known_without_computing(pair):
    lazy, real = pair
    assert (lazy.shape, lazy.size(-1), lazy.dim(), len(lazy), lazy.numel()) == (real.shape, 7, 3, 2, 70)
    assert (lazy.dtype, lazy.device) == (real.dtype, real.device)
    assert isinstance(lazy, torch.Tensor) and lazy.is_pending


def test_they_are_computed_once_and_changes_stay(pair):
    lazy, _ = pair
    lazy[:, 0] = 0
    assert not lazy.is_pending
    assert lazy.sum(-1)[:, 0].abs().sum() == 0


def test_gradients_are_those_of_the_call(pair):
    lazy, real = pair
    hidden = lazy.origin.hidden
    with torch.no_grad():
        lazy.argmax(-1)  # must not cost the gradient of what follows
    gradient = torch.autograd.grad(lazy.square().sum(), hidden)[0]
    assert torch.equal(gradient, torch.autograd.grad(real.square().sum(), hidden)[0])
    with torch.no_grad():
        inference = LazyLogits(lazy.origin.__class__(hidden, lazy.origin.linear, lazy.origin.compute))
    assert not (inference + 1).requires_grad


def test_autocast_is_that_of_the_call():
    linear = torch.nn.Linear(4, 7)
    hidden = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy, real = LazyLogits(Origin(hidden, linear, linear.forward)), linear(hidden)
    assert lazy.dtype == real.dtype == torch.bfloat16
    assert torch.equal(lazy.materialize(), real)


def test_they_survive_copies_files_and_numpy(pair):
    lazy, real = pair
    buffer = io.BytesIO()
    torch.save(lazy.detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), real)
    assert torch.equal(copy.deepcopy(lazy.detach()), real)
    assert np.array_equal(np.asarray(lazy.detach()), real.detach().numpy())


def test_a_head_that_changed_since_is_an_error(pair):
    lazy, _ = pair
    with torch.no_grad():
        lazy.origin.linear.weight.add_(1)
    with pytest.raises(TrainingError, match="return_logits=True"):
        lazy.argmax(-1)
