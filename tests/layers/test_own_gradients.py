"""Blocks as one function whose own weights are trained, against the same blocks of separate functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth.layers import fused_head, read_block
from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget
from unsloth.models.plan import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).parent))
import tiny_families as tiny
from test_whole_block import POSITIONS, blocks, separate

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "helium"]


def run(model, packed="packed", rows=2):
    """Loss, and gradients of all weights."""
    ids = torch.randint(3, 256, (rows, 19), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.config._attn_implementation = "unsloth"
    loss = model(input_ids=ids, labels=ids, position_ids=torch.tensor([POSITIONS[packed]] * rows), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make(family):
    return tiny.build(family).double().train().requires_grad_(True)


def whole(model, policy=False):
    made = plan(model, attention=True, whole=True)
    made.apply()
    checkpointing.apply(model, policy)
    return made


@pytest.mark.parametrize("packed", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_separate_functions(family, packed):
    model = make(family)
    expected = separate(model, lambda m: run(m, packed))
    assert len(expected[1]) == len(list(model.parameters()))
    for policy in (False, True):
        made = whole(model, policy)
        found = run(model, packed)
        assert all(r.fast.calls and not r.fast.partly for r in blocks(made)), str(made)
        assert tiny.worst(found, expected) < 1e-10
        made.undo()


@pytest.mark.parametrize("tile", [1, 7, 38])
@pytest.mark.parametrize("policy", [True, Budget(device=0, host=2**30), Budget(device=2**30)])
def test_tiles_and_places(tile, policy, monkeypatch):
    monkeypatch.setattr(read_block, "TILE", tile)
    monkeypatch.setattr(read_block, "LEAN_TILE", tile)
    model = make("llama")
    expected = separate(model, run)
    whole(model, policy)
    assert tiny.worst(run(model), expected) < 1e-10


@pytest.mark.parametrize("frozen", ["mlp.", "input_layernorm", "q_proj", "self_attn", "embed_tokens", "o_proj.weight"])
def test_some_weights_frozen(frozen):
    model = make("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    expected = separate(model, run)
    made = whole(model, True)
    assert tiny.worst(run(model), expected) < 1e-10
    assert all(not r.fast.partly for r in blocks(made))


def test_gradients_accumulate_as_always():
    model = make("llama")
    whole(model, True)
    _, once = run(model)
    ids = torch.randint(3, 256, (2, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([POSITIONS["packed"]] * 2)
    model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("tile", [7, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_float32_weights_with_bfloat16_products(family, tile, monkeypatch):
    monkeypatch.setattr(read_block, "TILE", tile)

    def mixed(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    def error(found):
        got, right = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (found[1], exact[1]))
        return ((got - right).norm() / right.norm()).item()

    model = tiny.build(family).train().requires_grad_(True)
    exact, apart = separate(model, run), separate(model, mixed)
    for policy in (False, True, Budget(device=0, host=2**30)):
        made = whole(model, policy)
        found = mixed(model)
        assert all(not r.fast.partly for r in blocks(made)), str(made)
        assert all(grad.dtype == torch.float32 for grad in found[1].values())
        assert error(found) < 1.6 * error(apart) < 0.1
        made.undo()


@pytest.mark.parametrize(
    ("family", "dtype", "mixes"),
    [("llama", torch.float16, True), ("qwen3", torch.bfloat16, True), ("llama", torch.bfloat16, False)],
)
def test_other_mixtures_of_dtypes_are_left_to_separate_functions(family, dtype, mixes):
    model = tiny.build(family).train().requires_grad_(True)
    made = whole(model)
    blocks(made)[0].fast.options.keeper.mixes = mixes
    with torch.autocast("cpu", dtype):
        run(model)
    assert all("another dtype" in next(iter(r.fast.partly)) for r in blocks(made))


@pytest.mark.parametrize(
    ("policy", "free", "late"),
    [
        (False, 0, False),
        (True, 2**40, True),
        (Budget(), 2**40, True),
        ("unsloth", 2**40, False),
        ("unsloth", 2**20, True),
    ],
)
def test_the_heads_gradient_waits_where_memory_is_short(policy, free, late, monkeypatch):
    monkeypatch.setattr(fused_head.gauge, "read", lambda device: fused_head.gauge.Reading(free, 0, 0))
    weight = torch.nn.Parameter(torch.empty(1000, 64, device="meta"))

    class Hidden:
        is_cuda, device, shape = True, None, (128, 64)

        @staticmethod
        def numel():
            return 128 * 64

    assert fused_head.weight_is_late(policy, Hidden, weight) is late
    assert not fused_head.weight_is_late(policy, Hidden, weight.detach())
