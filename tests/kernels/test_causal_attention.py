"""Attention with its passes apart against torch's attention and autograd, for every implementation of this device."""

import dataclasses

import pytest
import torch

from unsloth.core.errors import ConfigError
from unsloth.kernels.causal_attention import Visible, attention_backward, attention_forward, choose_backend
from unsloth.kernels.varlen_attention import Branches, Keys, varlen_attention_reference

ROWS = [[(0, 7), (7, 14)], [(0, 3), (3, 7), (7, 8), (8, 14)]]  # documents of two rows of 7 tokens


def inputs(device, dtype, heads=(4, 2), size=16):
    fused = torch.randn(2, 7, sum(heads) + heads[1], size, device=device, dtype=dtype)
    return *fused.split((*heads, heads[1]), dim=2), torch.randn(2, 7, heads[0], size, device=device, dtype=dtype)


def visible(documents, device, window=0):
    cu = torch.tensor([0, *(stop for _, stop in documents)], dtype=torch.int32, device=device)
    return Visible(cu, max(stop - start for start, stop in documents), len(documents) == 2, window)


def exact(q, k, v, do, seen, scale):
    """Output and gradients by autograd, in float64."""
    leaves = [x.double().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    out = varlen_attention_reference(*leaves, seen.cu_seqlens, scale=scale, window=seen.window)
    grads = torch.autograd.grad(out, leaves, do.double().flatten(0, 1))
    return [x.detach().view(like.shape) for x, like in zip((out, *grads), (q, q, k, v), strict=True)]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("documents", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference(device, dtype, documents, window):
    q, k, v, do = inputs(device, dtype)
    seen = visible(documents, device, window)
    attended = attention_forward(q, k, v, seen, 0.3, "reference")
    found = (attended.out, *attention_backward(do, q, k, v, attended, seen, 0.3))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for x, expected in zip(found, exact(q, k, v, do, seen, 0.3), strict=True):
        assert x.dtype == dtype and (x - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("groups", [2, 3, 9])
@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (3, 1)])
def test_heads_in_groups(device, groups, heads):
    q, k, v, do = inputs(device, torch.float64, heads)
    seen = visible(ROWS[1], device)
    attended = attention_forward(q, k, v, seen, 0.3, "reference")
    found = attention_backward(do, q, k, v, attended, seen, 0.3, groups)
    for x, expected in zip(found, attention_backward(do, q, k, v, attended, seen, 0.3), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-12, rtol=1e-10)


def branched(device):
    """Two rows of 7 tokens: 5 and a branch of 2 that sees 3 of them; 2, a branch of 1 that sees 1, and 4 alone."""
    cu = torch.tensor([0, 5, 7, 9, 10, 14], dtype=torch.int32, device=device)
    seen = [range(5), [0, 1, 2, 5, 6], [7, 8], [7, 9], range(10, 14)]
    bounds = torch.tensor([0, *torch.tensor([len(keys) for keys in seen]).cumsum(0).tolist()], dtype=torch.int32)
    gathered = torch.tensor([key for keys in seen for key in keys])
    return Visible(cu, 5, False, 0, Branches(Keys(bounds.to(device), 5), gathered.to(device)))


@pytest.mark.parametrize("backend", ["reference", "flash"])
@pytest.mark.parametrize("kind", ["documents", "branches"])
def test_room_for_others_changes_nothing(device, kind, backend):
    if backend == "flash" and not torch.cuda.is_available():
        pytest.skip("this operator exists on GPUs only")
    dtype = torch.float64 if backend == "reference" else torch.bfloat16
    q, k, v, do = inputs(device, dtype, size=64)
    seen = branched(device) if kind == "branches" else visible(ROWS[1], device)
    room = seen.room()
    other = visible(ROWS[0], device)
    if kind == "branches":
        bounds = torch.tensor([0, 7, 14], dtype=torch.int32, device=device)
        other = Visible(bounds, 7, False, 0, Branches(Keys(bounds, 7), torch.arange(14, device=device)))
    else:
        other = dataclasses.replace(other, single=False)
    assert other.room() == room and room.documents == 16 and room.keys == (1024 if kind == "branches" else 0)
    roomy = other.within(room)
    for now in (seen, other, seen):
        roomy.become(now)
        found = []
        for each in (now, roomy):
            attended = attention_forward(q, k, v, each, 0.3, backend)
            found.append((attended.out, *attention_backward(do, q, k, v, attended, each, 0.3)))
        for x, expected in zip(*found, strict=True):
            assert (x - expected).norm() <= (1e-12 if backend == "reference" else 1e-2) * expected.norm()
    assert visible(ROWS[0], device).room() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="these operators exist on GPUs only")
@pytest.mark.parametrize(("backend", "documents"), [("cudnn", ROWS[0]), ("flash", ROWS[0]), ("flash", ROWS[1])])
def test_operators_of_torch(device, backend, documents):
    q, k, v, do = inputs(device, torch.bfloat16, size=64)
    seen = visible(documents, device)
    attended = attention_forward(q, k, v, seen, 0.1, backend)
    found = (attended.out, *attention_backward(do, q, k, v, attended, seen, 0.1))
    for x, expected in zip(found, exact(q, k, v, do, seen, 0.1), strict=True):
        assert (x - expected).norm() <= 1e-2 * expected.norm()
    parts = attention_backward(do, q, k, v, attended, seen, 0.1, groups=2)
    for x, expected in zip(parts, found[1:], strict=True):
        assert (x - expected).norm() <= 1e-2 * expected.norm()


def test_choice():
    seen = visible(ROWS[0], "cpu")
    assert choose_backend(torch.device("cpu"), torch.float32, 64, seen) == "reference"
    q, k, v, _ = inputs("cpu", torch.float32)
    with pytest.raises(ConfigError, match="Unknown attention backend"):
        attention_forward(q, k, v, seen, 1.0, "other")
