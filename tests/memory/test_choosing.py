"""Layers of separate functions keep what there is room for, once it was seen what a step takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget
from unsloth.memory.choosing import Chooser
from unsloth.memory.gauge import Gauge, Reading
from unsloth.models.plan import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny

GIB = 2**30


class Device:
    """Memory that grows by a layer's share whenever it is looked at after one."""

    def __init__(self, total=80 * GIB, peak=10 * GIB, layer=3 * GIB):
        self.total, self.peak, self.layer, self.allocated = total, peak, layer, 8 * GIB

    def __call__(self, device):
        return Reading(self.total, self.allocated, self.peak)


def passing(chooser, memory, tokens=100, stepped=False, policy="unsloth"):
    """The layers that keep their values in a pass."""
    x, weight = torch.zeros(1, tokens, 4), torch.nn.Parameter(torch.zeros(1))
    weight.grad = None if stepped else torch.zeros(1)
    kept = []
    for layer in range(chooser.layers):
        if chooser.keeps(layer, policy, x, weight):
            kept.append(layer)
            with chooser.keeping(layer, x):
                memory.allocated += memory.layer * tokens // 100
    memory.allocated = 8 * GIB
    return kept


def test_all_that_fits_is_kept_after_a_step_and_a_pass():
    memory = Device()
    chooser = Chooser(16, Gauge(memory))
    assert passing(chooser, memory) == [15]  # what a layer takes is seen
    memory.peak = 41 * GIB  # 3 of them the layer's
    assert passing(chooser, memory) == [15]
    assert passing(chooser, memory, stepped=True) == [15]
    assert passing(chooser, memory) == list(range(4, 16)) == passing(chooser, memory)  # of 80 - 38 - 3.2
    assert passing(chooser, memory, tokens=50) == list(range(16))
    assert passing(chooser, memory, tokens=200) == [15]  # longer than any before
    assert passing(Chooser(16, Gauge(memory)), memory, policy=True) == []


def test_a_budget_is_kept():
    memory = Device()
    chooser, policy = Chooser(16, Gauge(memory)), Budget(device=10 * GIB)
    for _ in range(2):
        assert passing(chooser, memory, stepped=True, policy=policy) == [15]
    assert passing(chooser, memory, policy=policy) == [13, 14, 15]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_the_same_and_only_the_rest_is_computed_again(family, monkeypatch):
    model = tiny.build(family).train()
    made = plan(model, attention=True, whole=True, graphs=False)
    made.apply()
    checkpointing.apply(model, "unsloth")
    keeper = next(r.fast.options.keeper for r in made.replacements if r.new.startswith("block"))
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))

    def run():
        calls.clear()
        model.zero_grad()
        ids = torch.arange(18).view(2, 9) + 3
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    assert calls == [0, 1, 1, 0]
    chooser = keeper.separate = Chooser(2, Gauge(Device()))
    assert tiny.worst(run(), expected) == 0 and calls == [0, 1, 0]
    monkeypatch.setattr(chooser, "_begin", lambda *_: setattr(chooser, "_kept", 2))
    assert tiny.worst(run(), expected) == 0 and calls == [0, 1]
