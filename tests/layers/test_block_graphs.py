"""Recorded blocks against blocks that are launched call by call, with a recorder that computes on the CPU.

What it replays is the very function that would be recorded, on the buffers that graphs share; so all around the graphs
is tested here: what is copied in and out, when it is recorded anew, and when not at all. That a CUDA graph replays what
was launched is torch's part; bench/train.py compares gradients on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth.layers import block_graphs
from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget
from unsloth.models import families
from unsloth.models.plan import plan
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny


class Recorder:
    """In the place of a CUDA graph: leaves the buffers as they are while recording, and computes at each replay."""

    made = 0

    def __init__(self, shared, launch):
        Recorder.made += 1
        buffers = [shared.x, shared.y, shared.out, shared.lse, shared.t_d, shared.flat]
        before = [buffer.clone() for buffer in buffers]
        launch()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        self.replay = launch


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    Recorder.made = 0
    monkeypatch.setattr(block_graphs, "record", Recorder)
    monkeypatch.setattr(block_graphs, "can_record", lambda x: True)
    monkeypatch.setattr(block_graphs, "new_pool", lambda device: (None, None))


def make(family="llama", targets=tiny.TARGETS, graphs=True):
    model = tiny.build(family)
    model = tiny.adapt(model, resolve_targets(families.find(model), targets))
    model.get_base_model().config._attn_implementation = "unsloth"
    made = plan(model, attention=True, whole=True, graphs=graphs)
    made.apply()
    checkpointing.apply(model.get_base_model(), True)
    return model, made


def run(model, seed=0, tokens=9, first=0):
    ids = torch.randint(3, 256, (2, tokens), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(first, first + tokens)[None]
    embedded = model.get_base_model().get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    loss = model(inputs_embeds=embedded, labels=ids, position_ids=positions, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**grads, "embedded": embedded.grad}


def keeper_of(made):
    return next(r.fast.options.keeper for r in made.replacements if r.new.startswith("block"))


def recorded(made):
    return sum(len(shape.captured) for shape in keeper_of(made).shapes.values())


@pytest.mark.parametrize(("family", "blocks"), [("llama", 2), ("qwen2", 1), ("qwen3", 1)])  # the others have windows
def test_replays_are_equal_for_new_values_every_time(family, blocks):
    (model, made), (other, plain) = make(family), make(family, graphs=False)
    for seed in range(5):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(0.01)
                    twin.add_(0.01)
        assert recorded(made) == (blocks if seed >= 2 else 0)
    assert recorded(plain) == 0 and Recorder.made == 2 * blocks


def test_positions_of_this_batch_count():
    (model, made), (other, _) = make(), make(graphs=False)
    for first in (0, 0, 0, 7, 3, 0):
        assert tiny.worst(run(model, first=first), run(other, first=first)) < 1e-6
    assert recorded(made) == 2 and Recorder.made == 4


def test_two_forwards_before_their_backwards():
    (model, made), (other, _) = make(), make(graphs=False)
    for m in (model, other):
        for seed in range(3):
            run(m, seed)
    assert recorded(made) == 2

    def both(m):
        m.zero_grad()
        losses = []
        for seed, first in ((1, 0), (2, 5)):
            ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
            positions = torch.arange(first, first + 9)[None]
            losses.append(m(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss)
        for loss in losses:
            loss.backward()
        return sum(losses).detach(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    assert tiny.worst(both(model), both(other)) < 1e-6


def test_offloaded_values_and_graphs_together():
    (model, made), (other, _) = make(), make(graphs=False)
    checkpointing.apply(model.get_base_model(), Budget(device=0, host=2**20))
    for seed in range(4):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert recorded(made) == 2


def test_other_tensors_are_recorded_anew():
    (model, _), (other, _) = make(), make(graphs=False)
    for m in (model, other):
        for seed in range(3):
            run(m, seed)
    before = Recorder.made
    for m in (model, other):
        layer = m.get_base_model().model.layers[1].mlp.up_proj
        layer.lora_A["default"].weight = torch.nn.Parameter(torch.full_like(layer.lora_A["default"].weight, 0.1))
        layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight * 2, requires_grad=False)
    assert tiny.worst(run(model), run(other)) < 1e-6
    assert Recorder.made == before + 2


def test_many_shapes_are_not_all_recorded():
    model, made = make()
    for tokens in (3, 4, 5, 6, 7, 8, 9):
        run(model, tokens=tokens)
    assert len(keeper_of(made).shapes) == 4 and recorded(made) == 0
    for _ in range(3):
        run(model, tokens=12)
    assert recorded(made) == 2


@pytest.mark.parametrize("case", ["packed", "kept", "some adapters"])
def test_calls_that_are_never_recorded(case):
    model, made = make(targets=["q_proj"] if case == "some adapters" else tiny.TARGETS)
    if case == "kept":
        checkpointing.apply(model.get_base_model(), False)
    ids = torch.randint(3, 256, (1, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3] if case == "packed" else list(range(8))])
    for _ in range(4):
        model(input_ids=ids, labels=ids, position_ids=positions.clone(), use_cache=False).loss.backward()
    assert recorded(made) == 0


def test_a_failure_is_said_and_the_blocks_go_on(monkeypatch, caplog):
    def fails(shared, launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(block_graphs, "record", fails)
    (model, made), (other, _) = make(), make(graphs=False)
    for seed in range(4):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert recorded(made) == 0
    assert "not permitted" in caplog.text
