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
from unsloth.models import families, modes
from unsloth.models.plan import plan
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny


class Recorder:
    """In the place of a CUDA graph: leaves the buffers as they are while recording, and computes at each replay."""

    made = 0

    def __init__(self, shared, launch):
        Recorder.made += 1
        buffers = [shared.y, shared.flat, *(shared.values.tensors() if shared.values is not None else [])]
        before = [buffer.clone() for buffer in buffers]
        self.launch, self.left = launch, launch()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    def replay(self):
        for to, value in zip(self.left, self.launch(), strict=True):
            to.copy_(value)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    Recorder.made = 0
    monkeypatch.setattr(block_graphs, "record", Recorder)
    monkeypatch.setattr(block_graphs, "can_record", lambda x: True)
    monkeypatch.setattr(block_graphs, "new_pool", lambda device: (None, None))


def make(family="llama", targets=tiny.TARGETS, graphs=True, policy=True):
    model = tiny.build(family)
    model = tiny.adapt(model, resolve_targets(families.find(model), targets))
    model.get_base_model().config._attn_implementation = "unsloth"
    made = plan(model, attention=True, whole=True, graphs=graphs)
    made.apply()
    checkpointing.apply(model.get_base_model(), policy)
    return model, made


def run(model, seed=0, tokens=9, first=0, positions=None, rows=2):
    positions = torch.arange(first, first + tokens)[None] if positions is None else positions
    ids = torch.randint(3, 256, (rows, positions.shape[1]), generator=torch.Generator().manual_seed(seed))
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


KEPT = [False, Budget(device=2**30)]


@pytest.mark.parametrize("policy", KEPT)
@pytest.mark.parametrize(("family", "blocks"), [("llama", 2), ("qwen2", 1), ("qwen3", 1)])
def test_blocks_that_keep_their_values_are_replayed_too(family, blocks, policy):
    (model, made), (other, plain) = make(family, policy=policy), make(family, graphs=False, policy=False)
    for seed in range(5):
        assert tiny.worst(run(model, seed, first=3 * seed), run(other, seed, first=3 * seed)) < 1e-6
        assert recorded(made) == (blocks if seed >= 2 else 0)
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(0.01)
                    twin.add_(0.01)
    assert recorded(plain) == 0 and Recorder.made == 2 * blocks


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize(("family", "blocks"), [("llama", 2), ("qwen2", 1), ("qwen3", 1)])
def test_blocks_whose_own_weights_are_trained_are_replayed_too(family, blocks, policy):
    def make(graphs):
        model = tiny.build(family).train().requires_grad_(True)
        model.model.layers[0].mlp.requires_grad_(False)
        model.config._attn_implementation = "unsloth"
        made = plan(model, attention=True, whole=True, graphs=graphs)
        made.apply()
        checkpointing.apply(model, policy)
        return model, made

    def run(model, seed):
        ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids, position_ids=torch.arange(9)[None], use_cache=False).loss
        loss.backward()  # gradients accumulate
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (model, made), (other, _) = make(True), make(False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, other)]
    for seed in range(6):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-5
        assert recorded(made) == (blocks if seed >= 2 else 0)
        if seed % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert Recorder.made == 2 * blocks


@pytest.mark.parametrize(("graphs", "policy"), [(True, Budget(device=0, host=2**30)), (None, True)])
def test_blocks_with_trained_weights_are_recorded_only_if_asked_for_and_memory_is_not_short(graphs, policy):
    model = tiny.build("llama").train().requires_grad_(True)
    model.config._attn_implementation = "unsloth"
    made = plan(model, attention=True, whole=True, graphs=graphs)
    made.apply()
    checkpointing.apply(model, policy)
    for _ in range(4):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), labels=torch.ones(1, 9, dtype=torch.long)).loss.backward()
    assert not recorded(made)


def test_what_is_kept_and_what_is_computed_again_in_one_pass():
    (model, made), (other, _) = make(), make(graphs=False)
    checkpointing.apply(model.get_base_model(), Budget(device=260_000, host=0))
    for seed in range(5):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert [place.value for place in keeper_of(made).assignment.places] == ["recompute", "keep"]
    assert recorded(made) == 2
    checkpointing.apply(model.get_base_model(), True)
    for seed in range(3):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert recorded(made) == 2 and Recorder.made == 8 and not keeper_of(made)._bytes()


def test_one_shape_stands_until_it_has_not_come_for_long():
    (model, made), (other, _) = make(policy=False), make(graphs=False)
    keeper = keeper_of(made)
    for tokens in (9, 9, 9, 7, 7, 7, 9):
        assert tiny.worst(run(model, tokens=tokens), run(other, tokens=tokens)) < 1e-6
        assert list(keeper._standing) == ([(2, 9, 64, None)] if recorded(made) else [])
    assert recorded(made) == 2 and keeper._bytes() > 2 * 2 * 9 * 64 * 4
    for _ in range(20):
        run(model, tokens=7)
    assert list(keeper._standing) == [(2, 7, 64, None)] and recorded(made) == 2
    assert tiny.worst(run(model, tokens=7), run(other, tokens=7)) < 1e-6
    keeper.release()
    assert recorded(made) == 0 and not keeper._bytes()
    assert tiny.worst(run(model, tokens=7), run(other, tokens=7)) < 1e-6
    assert recorded(made) == 2
    modes.for_inference(model)
    assert not keeper.shapes and not keeper._bytes()


def test_positions_of_this_batch_count():
    (model, made), (other, _) = make(), make(graphs=False)
    for first in (0, 0, 0, 7, 3, 0):
        assert tiny.worst(run(model, first=first), run(other, first=first)) < 1e-6
    assert recorded(made) == 2 and Recorder.made == 4


def test_where_room_is_counted_shapes_stand_beside_each_other_as_far_as_they_fit():
    (model, made), (other, _) = make(policy=Budget(device=2**30)), make(graphs=False)
    keeper = keeper_of(made)

    def alternate():
        for tokens in (9, 7) * 4:
            assert tiny.worst(run(model, tokens=tokens), run(other, tokens=tokens)) < 1e-6

    alternate()
    assert list(keeper._standing) == [(2, 9, 64, None), (2, 7, 64, None)] and recorded(made) == 4
    budget = keeper.assignment.device_bytes(keeper._asked[1]) * 10 // 7  # not for both
    checkpointing.apply(model.get_base_model(), Budget(device=budget))
    alternate()
    assert 0 < keeper._bytes() < budget and recorded(made) == 4
    kept = {batch: sum(map(bool, layers.values())) for batch, layers in keeper._standing.items()}
    assert 2 <= sum(kept.values()) < 4
    least = min(kept, key=kept.__getitem__)
    for _ in range(20):
        run(model, tokens=least[1])
    assert list(keeper._standing) == [least]  # the others have not come for long
    assert all(keeper._standing[least].values()) and len(keeper._standing[least]) == 2


@pytest.mark.parametrize("policy", [True, False])
def test_two_forwards_before_their_backwards(policy):
    (model, made), (other, _) = make(policy=policy), make(graphs=False)
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
    assert tiny.worst(run(model), run(other)) < 1e-6


def test_hidden_states_that_somebody_changes_between_blocks():
    def changed(module, args, y):
        y.register_hook(lambda grad: grad[:, 1:].mul_(1.5).sum() * 0 + grad)  # in place: only its version tells
        return y * 0.9 if module.self_attn.layer_idx else y

    for policy in (True, False):
        (model, made), (other, _) = make(policy=policy), make(graphs=False, policy=policy)
        for m, layer in ((m, i) for m in (model, other) for i in range(2)):
            m.get_base_model().model.layers[layer].register_forward_hook(changed)
        for seed in range(4):
            assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
        assert recorded(made) == 2


def test_a_forward_without_a_backward_does_not_block_the_next():
    (model, made), (other, _) = make(policy=False), make(graphs=False)
    for seed in range(3):
        run(model, seed), run(other, seed)
    ids = torch.full((2, 9), 5)
    model(input_ids=ids, labels=ids, use_cache=False)
    assert all(one.user() is None for known in keeper_of(made).shapes.values() for one in known.captured.values())
    assert tiny.worst(run(model), run(other)) < 1e-6


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
    for tokens in range(3, 21):
        run(model, tokens=tokens)
    assert len(keeper_of(made).shapes) == 16 and recorded(made) == 0
    for _ in range(3):
        run(model, tokens=21)
    assert recorded(made) == 2


@pytest.mark.parametrize("policy", [True, Budget(0, 2**30)], ids=["recompute", "offload"])
def test_shorter_shapes_use_the_buffers_of_a_longer_one(policy):
    (model, made), (other, _) = make(policy=policy), make(graphs=False, policy=policy)
    for seed, tokens in enumerate([9, 9, 9, 7, 7, 7, 4, 4, 4, 11, 11, 11, 7, 9, 4, 11]):
        found, expected = (run(m, seed, tokens) for m in (model, other))
        assert tiny.worst(found, expected) < 1e-6
    assert recorded(made) == 8
    shapes = [known.shared for known in keeper_of(made).shapes.values()]
    assert [shared.buffer is shapes[0].buffer for shared in shapes] == [True, True, True, False]
    for name in ("flat", "y"):
        assert len({getattr(shared, name).data_ptr() for shared in shapes[:3]}) == 1
    kept = [shared.values for shared in shapes[:3]]
    assert len({values.x.data_ptr() for values in kept}) == len({v.attended.out.data_ptr() for v in kept}) == 1


def test_passes_of_two_shapes_at_once():
    def both(model):
        model.zero_grad()
        ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(5))
        losses = [model(input_ids=part, labels=part, use_cache=False).loss for part in (ids, ids[:, :6])]
        (losses[0] + 2 * losses[1]).backward()
        return sum(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (model, made), (other, _) = make(), make(graphs=False)
    for _ in range(4):
        assert tiny.worst(both(model), both(other)) < 1e-6
    assert recorded(made) == 4


def test_a_block_of_another_shape_between_two_blocks():
    (model, made), (other, _) = make(), make(graphs=False)

    def disturbed(model):
        inner = model.get_base_model().model
        short = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
        tables = inner.rotary_emb(short, torch.arange(4)[None])
        kwargs = {"position_embeddings": tables, "position_ids": torch.arange(4)[None]}

        def disturb(*_):
            inner.layers[1](short.clone().requires_grad_(), **kwargs)

        hook = inner.layers[0].register_forward_hook(disturb)
        found = run(model, 3)
        hook.remove()
        return found

    for tokens in (9, 9, 9, 4, 4, 4):
        run(model, 1, tokens)
    assert recorded(made) == 4
    assert tiny.worst(disturbed(model), disturbed(other)) < 1e-6


def layout(starts):
    """Positions of documents and branches that start at the first of each pair, with the second."""
    bounds = [at for at, _ in starts] + [20]
    return [p for (at, first), stop in zip(starts, bounds[1:], strict=True) for p in range(first, first + stop - at)]


DOCUMENTS = [layout([(0, 0), (7, 0), (12, 0)]), layout([(0, 0), (1, 0), (3, 0), (19, 0)]), layout([(0, 0), (14, 0)])]
BRANCHES = [layout([(0, 0), (9, 4), (14, 0)]), layout([(0, 0), (5, 2), (8, 1), (12, 0), (15, 3)])]


@pytest.mark.parametrize("batches", [DOCUMENTS, BRANCHES], ids=["documents", "branches"])
def test_documents_of_this_batch_count(batches):
    (model, made), (other, _) = make(), make(graphs=False)
    for i in range(7):
        positions = torch.tensor(batches[i % len(batches)])[None]
        found, expected = (run(m, seed=i, positions=positions.clone(), rows=1) for m in (model, other))
        assert tiny.worst(found, expected) < 1e-6
    assert recorded(made) == 2 and Recorder.made == 4


def test_passes_without_gradients_replay_forwards_once_training_is_recorded():
    (model, made), (other, _) = make(), make(graphs=False)
    keeper = keeper_of(made)
    positions = torch.tensor(BRANCHES[0] * 4)[None]  # as many tokens as are worth it without gradients

    @torch.no_grad()
    def read(m, seed):
        ids = torch.randint(3, 256, positions.shape, generator=torch.Generator().manual_seed(seed))
        with m.disable_adapter():
            reference = m(input_ids=ids, position_ids=positions, use_cache=False).logits
        return reference, m(input_ids=ids, position_ids=positions, use_cache=False).logits

    for step in range(5):
        for x, expected in zip(read(model, step), read(other, step), strict=True):
            assert (x - expected).abs().max() < 1e-5
        readings = sum(len(shape.readings) for shape in keeper.shapes.values())
        assert readings == (4 if step > 2 else 0)
        for m in (model, other):
            run(m, step, positions=positions.clone(), rows=1)
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(0.01)
                    twin.add_(0.01)
    assert Recorder.made == 8


def test_in_inference_mode_nothing_is_replayed_or_remembered():
    (model, made), (other, _) = make(), make(graphs=False)
    positions = torch.tensor(BRANCHES[0] * 4)[None]
    ids = torch.randint(3, 256, positions.shape, generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        run(model, seed, positions=positions, rows=1)
    with torch.no_grad():
        expected = other(input_ids=ids, position_ids=positions.clone(), use_cache=False).logits
    with torch.inference_mode():
        for given in (positions, positions.clone(), positions.clone()):
            found = model(input_ids=ids, position_ids=given, use_cache=False).logits
            assert (found - expected).abs().max() < 1e-5
        model(input_ids=ids, use_cache=False)
    assert not any(shape.readings for shape in keeper_of(made).shapes.values())
    assert tiny.worst(run(model, 1, positions=positions, rows=1), run(other, 1, positions=positions, rows=1)) < 1e-6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_adapters_on_some_layers_only(targets):
    (model, made), (other, _) = make(targets=targets), make(targets=targets, graphs=False)
    for seed in range(4):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert recorded(made) == 2


def test_a_failure_is_said_and_the_blocks_go_on(monkeypatch, caplog):
    def fails(shared, launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(block_graphs, "record", fails)
    (model, made), (other, _) = make(), make(graphs=False)
    for seed in range(4):
        assert tiny.worst(run(model, seed), run(other, seed)) < 1e-6
    assert recorded(made) == 0
    assert "not permitted" in caplog.text
