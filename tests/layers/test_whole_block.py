"""A block as one function against the same block of separate functions, and against plain transformers and PEFT."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from unsloth.core.errors import ModelError
from unsloth.layers import read_block
from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget, Place
from unsloth.models import families
from unsloth.models.plan import plan
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny

WHOLE = ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "helium", "ernie4_5"]
PACKED = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]


BRANCHED = [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 2, 3, 0, 1, 2, 3, 4, 5, 6]
POSITIONS = {"packed": PACKED, "branched": BRANCHED, "whole": list(range(19))}


def make(
    family: str, dtype: torch.dtype = torch.float64, quantized: bool = False, layers: int = 2, **options
) -> torch.nn.Module:
    with mock.patch.dict(tiny.COMMON, num_hidden_layers=layers):
        model = tiny.build(family)
    if quantized:
        tiny.quantize(model)
    model = tiny.adapt(model, resolve_targets(families.find(model), tiny.TARGETS), **options)
    return model if quantized else model.to(dtype)


def run(model, implementation="unsloth", packed="packed", rows=2, checkpoint=False):
    """Loss, adapter gradients, and the gradient of the embedding's output."""
    inner = model.get_base_model()
    inner.config._attn_implementation = implementation
    if checkpoint:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 256, (rows, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([POSITIONS[packed]] * rows)
    embedded = inner.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    loss = model(inputs_embeds=embedded, labels=ids, position_ids=positions, use_cache=False).loss
    loss.backward()
    if checkpoint:
        inner.gradient_checkpointing_disable()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**grads, "embedded": embedded.grad}


def blocks(made):
    return [r for r in made.replacements if r.new.startswith("block")]


def separate(model, compute=run):
    """What the separate functions give: unlike transformers' own they compute in float64 throughout."""
    made = plan(model, attention=True, whole=False)
    made.apply()
    found = compute(model)
    assert not any(r.fast.partly for r in blocks(made))
    made.undo()
    return found


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("packed", POSITIONS)
@pytest.mark.parametrize("family", WHOLE)
def test_equal_to_separate_functions(family, packed, checkpoint):
    model = make(family)
    expected = separate(model, lambda m: run(m, packed=packed))
    made = plan(model, attention=True, whole=True)
    made.apply()
    found = run(model, packed=packed, checkpoint=checkpoint)
    assert all(r.fast.calls == 1 and not r.fast.partly for r in blocks(made)), str(made)
    assert tiny.worst(found, expected) < 1e-10


def budgeted(model, policy):
    checkpointing.apply(model.get_base_model(), policy)


def places(made):
    return blocks(made)[0].fast.options.keeper.assignment.places


@pytest.mark.parametrize("family", ["llama", "helium"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Budget(device=0, host=2**30), [Place.OFFLOAD] * 3 + [Place.RECOMPUTE] * 2),
        (Budget(device=0, host=0), [Place.RECOMPUTE] * 5),
        (Budget(device=2**30), [Place.KEEP] * 5),
    ],
)
def test_wherever_values_wait_the_gradients_are_the_same(family, policy, expected):
    model = make(family, layers=5)
    made = plan(model, attention=True, whole=True)
    made.apply()
    kept = run(model)
    budgeted(model, policy)
    found = run(model)
    assert list(places(made)) == expected
    assert torch.equal(found[0], kept[0])
    assert tiny.worst(found, kept) < 1e-12


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_in_groups_give_the_same(family, monkeypatch):
    monkeypatch.setattr(read_block, "head_groups", lambda rows, key_heads: 2)
    model = make(family)
    expected = separate(model)
    plan(model, attention=True, whole=True).apply()
    budgeted(model, Budget(device=0, host=2**30))
    assert tiny.worst(run(model), expected) < 1e-10


def test_a_full_host_leaves_the_rest_on_the_device():
    model = make("llama", layers=4)
    expected = separate(model)
    made = plan(model, attention=True, whole=True)
    made.apply()
    budgeted(model, Budget(device=0, host=65536))
    found = run(model)
    assert list(places(made)) == [Place.OFFLOAD] + [Place.RECOMPUTE] * 3
    assert tiny.worst(found, expected) < 1e-10


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tile", [1, 7, 38])
def test_tiles_of_any_size_sum_to_the_same(tile, keep, monkeypatch):
    monkeypatch.setattr(read_block, "TILE", tile)
    model = make("llama")
    expected = separate(model)
    plan(model, attention=True, whole=True).apply()
    budgeted(model, not keep)
    assert tiny.worst(run(model), expected) < 1e-10


@pytest.mark.parametrize("checkpoint", [False, True])
def test_quantized_weights(checkpoint):
    model = make("llama", quantized=True)
    expected = run(model)
    made = plan(model, attention=True, whole=True)
    made.apply()
    found = run(model, checkpoint=checkpoint)
    assert all(r.fast.calls == 1 and not r.fast.partly for r in blocks(made)), str(made)
    assert tiny.worst(found, expected) < 1e-5


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "down_proj"], ["gate_proj", "o_proj"]])
def test_adapters_on_some_layers_only(targets):
    model = tiny.adapt(tiny.build("llama"), targets).double()
    expected = separate(model)
    plan(model, attention=True, whole=True).apply()
    for checkpoint in (False, True):
        assert tiny.worst(run(model, checkpoint=checkpoint), expected) < 1e-10


def test_without_a_gradient_of_the_first_input():
    model = make("llama")
    ids = torch.randint(3, 256, (1, 9), generator=torch.Generator().manual_seed(1))

    def gradients(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.tensor(1.0), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = separate(model, gradients)
    plan(model, attention=True, whole=True).apply()
    assert tiny.worst(gradients(model), expected) < 1e-10


def test_calls_that_do_not_fit_take_the_separate_functions_and_say_why():
    model = make("llama", lora_dropout=0.5)
    made = plan(model, attention=True, whole=True)
    made.apply()
    run(model)
    assert all("dropout on the adapter's input" in next(iter(r.fast.partly)) for r in blocks(made))
    model = make("gemma3")
    made = plan(model, attention=True, whole=True)
    made.apply()
    run(model)
    assert all("another structure" in next(iter(r.fast.partly)) for r in blocks(made))


def test_padded_batches_are_equal_too():
    model = tiny.adapt(tiny.build("llama"), tiny.TARGETS)
    expected = tiny.run(model)
    made = plan(model, whole=True)
    made.apply()
    assert tiny.worst(tiny.run(model), expected) < 1e-5
    assert all(next(iter(r.fast.partly)).endswith("an attention mask") for r in blocks(made))


def one_block(x):
    model = make("llama")
    plan(model, attention=True, whole=True).apply()
    inner = model.get_base_model().model
    inner.config._attn_implementation = "unsloth"
    tables = inner.rotary_emb(x, torch.arange(x.shape[1])[None])
    return inner.layers[0](x, position_embeddings=tables)


def test_a_second_backward_is_refused():
    y = one_block(torch.randn(1, 5, 64, dtype=torch.float64)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(ModelError, match="a second backward"):
        y.backward()


def test_an_input_changed_in_place_is_noticed():
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    y = one_block(x).sum()
    x.add_(1)
    with pytest.raises(ModelError, match="changed in place"):
        y.backward()


def test_values_are_gone_after_the_backward_and_with_the_graph():
    model = make("llama", layers=4)
    made = plan(model, attention=True, whole=True)
    made.apply()
    budgeted(model, Budget(device=0, host=2**20))
    run(model)
    arena = blocks(made)[0].fast.options.keeper._offloader.arena
    assert arena.reserved and not arena.used
    loss = model(input_ids=torch.ones(1, 6, dtype=torch.int64), labels=torch.ones(1, 6, dtype=torch.int64)).loss
    used = arena.used
    del loss
    assert used and not arena.used


def test_a_copy_of_the_model_has_a_memory_of_its_own():
    model = make("llama", layers=4)
    made = plan(model, attention=True, whole=True)
    made.apply()
    budgeted(model, Budget(device=0, host=2**20))
    expected = run(model)
    copied = copy.deepcopy(model)
    ours, theirs = (m.get_base_model().model.layers for m in (model, copied))
    keepers = {id(layer.unsloth_fast.options.keeper) for layer in theirs}
    assert len(keepers) == 1 and id(ours[0].unsloth_fast.options.keeper) not in keepers
    assert tiny.worst(run(copied), expected) < 1e-12


def test_held_weights_serve_every_step_and_follow_adapters_and_base():
    model = make("llama", quantized=True)
    made = plan(model, attention=True, whole=True)
    made.apply()
    keeper = blocks(made)[0].fast.options.keeper
    adapters = [p for p in model.parameters() if p.requires_grad]
    for step in range(3):
        budgeted(model, Budget(device=2**30))
        found = run(model)
        assert keeper.assignment.holding == 2 and set(keeper.held(1)) == {"qkv", "output", "gate_up", "down"}
        budgeted(model, False)
        assert tiny.worst(found, run(model)) < 1e-6
        with torch.no_grad():
            for parameter in adapters:
                parameter.data.add_(0.1 * (step + 1))  # as optimizers do that do not raise the version
    budgeted(model, Budget(device=2**30))
    before = run(model)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.merge()
    layer.unmerge()
    assert not torch.equal(run(model)[0], before[0])
    found = run(model)
    budgeted(model, False)
    assert tiny.worst(found, run(model)) < 1e-6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "down_proj"], ["gate_proj", "o_proj"]])
def test_weights_are_held_where_some_layers_have_no_adapter(targets):
    model = tiny.build("llama")
    tiny.quantize(model)
    model = tiny.adapt(model, targets)
    expected = run(model)
    made = plan(model, attention=True, whole=True)
    made.apply()
    budgeted(model, Budget(device=2**30))
    for _ in range(2):
        assert tiny.worst(run(model), expected) < 1e-5
    assert blocks(made)[0].fast.options.keeper.assignment.holding == 2


def test_held_weights_go_when_there_is_no_room():
    model = make("llama", quantized=True)
    made = plan(model, attention=True, whole=True)
    made.apply()
    keeper = blocks(made)[0].fast.options.keeper
    budgeted(model, Budget(device=2**30))
    run(model)
    assert set(keeper._held) == {0, 1}
    budgeted(model, Budget(device=0, host=2**20))
    run(model)
    assert keeper._held == {}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("adapters", [True, False])
def test_without_gradients_too_a_block_is_one_function(quantized, adapters):
    model = make("qwen3" if adapters else "llama", quantized=quantized)
    model.get_base_model().config._attn_implementation = "unsloth"
    ids = torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(20), *range(7, 30), *range(21)]] * 2)

    @torch.no_grad()
    def read(model):
        with contextlib.nullcontext() if adapters else model.disable_adapter():
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    expected = separate(model, read)
    made = plan(model, attention=True, whole=True)
    made.apply()
    assert (read(model) - expected).abs().max() < (1e-4 if quantized else 1e-10)
    assert not any(r.fast.partly for r in blocks(made)), str(made)
    budgeted(model, Budget(device=2**30))
    run(model)
    assert blocks(made)[0].fast.options.keeper.assignment.holding == (2 if quantized else 0)
    model.eval()
    assert (read(model) - expected).abs().max() < (1e-4 if quantized else 1e-10)
    with torch.no_grad():
        cached = model(input_ids=ids, position_ids=positions[:1], use_cache=True)
    assert cached.past_key_values.get_seq_length() == 64
    assert not any(r.fast.partly for r in blocks(made)), str(made)
