"""Attention without masks over all pairs: the same as transformers' own ``sdpa`` with them, for every kind of batch."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from unsloth.layers import packed_attention
from unsloth.models.plan import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny


@pytest.fixture(params=["kernel", "mask"])
def path(request, monkeypatch):
    """Documents one by one, as the kernels have it; or torch's attention with a mask."""
    backends = ("sdpa", "reference") if request.param == "kernel" else ()
    monkeypatch.setattr(packed_attention, "_KERNELS", backends)


def model_of(family):
    model = tiny.build(family)
    model.set_attn_implementation("sdpa")
    return model


def run(model, **batch):
    model.zero_grad()
    loss = model(use_cache=False, **batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(rows):
    ids = tiny.batch()["input_ids"][:1].repeat(rows, 1)
    positions = [[7, 5], [2, 10]][:rows]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in positions])
    return {"input_ids": ids, "labels": ids, "position_ids": position_ids}


BATCHES = {
    "padded": tiny.batch(),
    "whole": {name: tensor[:1].repeat(2, 1) for name, tensor in tiny.batch().items() if name != "attention_mask"},
    "packed": packed(1),
    "packed rows": packed(2),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_equals_sdpa(family, batch, path):
    model = model_of(family)
    plain = run(model, **BATCHES[batch])
    made = plan(model, attention=True)
    made.apply()
    assert model.config._attn_implementation == packed_attention.NAME
    assert tiny.worst(run(model, **BATCHES[batch]), plain) < 1e-5
    made.undo()
    assert model.config._attn_implementation == "sdpa"


def test_the_kernel_path_is_taken_for_packed_documents(monkeypatch):
    calls = []
    monkeypatch.setattr(packed_attention, "_KERNELS", ("sdpa", "reference"))
    true = packed_attention.varlen_attention

    def counted(q, k, v, cu_seqlens, **options):
        calls.append((cu_seqlens.tolist(), options["longest"], options["window"]))
        return true(q, k, v, cu_seqlens, **options)

    monkeypatch.setattr(packed_attention, "varlen_attention", counted)
    model = model_of("mistral")
    plan(model, attention=True).apply()
    run(model, **packed(1))
    assert calls == [([0, 7, 12], 7, 5)] * 2


def test_documents_are_found_once_and_again_after_a_change():
    positions = packed(2)["position_ids"]
    first = packed_attention.documents_of(positions, 2)
    assert first.cu_seqlens.tolist() == [0, 7, 12, 14, 24] and first.longest == 10 and not first.single
    assert packed_attention.documents_of(positions, 2) is first
    positions.copy_(torch.arange(12))
    assert packed_attention.documents_of(positions, 2).single
    assert packed_attention.documents_of(torch.arange(12)[None], 3).cu_seqlens.tolist() == [0, 12, 24, 36]


def branches():
    """A document of 3 + 4 tokens, with a branch of 2 after the third and one of 3 after the second; then one of 5."""
    ids = tiny.batch()["input_ids"].flatten()[:17][None]
    parts = [range(7), range(3, 5), range(2, 5), range(5)]
    positions = torch.tensor([[position for part in parts for position in part]])
    rows = [ids[:, :7], ids[:, [0, 1, 2, 7, 8]], ids[:, [0, 1, 9, 10, 11]], ids[:, 12:]]
    own = [slice(0, 7), slice(3, 5), slice(2, 5), slice(0, 5)]
    return ids, positions, rows, own


def weighted(logits):
    """A number that depends on every logit."""
    logits = logits.flatten(0, 1)
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum() / logits.numel()


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES.keys() - {"gemma2", "vaultgemma"}))  # they need "eager"
def test_a_branch_sees_its_beginning_and_itself(family, path):
    ids, positions, rows, own = branches()
    model = model_of(family).eval()
    alone = torch.cat([model(input_ids=row).logits[:, part] for row, part in zip(rows, own, strict=True)], dim=1)
    weighted(alone).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    plan(model, attention=True).apply()
    assert model.config._attn_implementation == packed_attention.NAME
    model.zero_grad()
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    weighted(together).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert tiny.worst((torch.ones(()), ours), (torch.ones(()), plain)) < 1e-4


def test_branches_are_read_off_positions():
    _, positions, _, _ = branches()
    found = packed_attention.documents_of(positions, 1)
    assert found.cu_seqlens.tolist() == [0, 7, 9, 12, 17]
    assert found.branches.keys.cu_seqlens.tolist() == [0, 7, 12, 17, 22] and found.branches.keys.longest == 7
    assert found.branches.gathered.tolist() == [*range(7), 0, 1, 2, 7, 8, 0, 1, 9, 10, 11, *range(12, 17)]
    # positions that leap ahead, or begin above 0, are documents, as transformers has it
    other = packed_attention.documents_of(torch.tensor([[4, 5, 0, 1, 2, 7, 8]]), 1)
    assert other.cu_seqlens.tolist() == [0, 2, 5, 7] and other.branches is None


def test_attention_dropout_sees_the_same_pairs():
    model = model_of("mistral")
    for block in model.model.layers:
        block.self_attn.attention_dropout = 1e-9
    plain = run(model, **packed(1))
    plan(model, attention=True).apply()
    assert tiny.worst(run(model, **packed(1)), plain) < 1e-4


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_generation(family, path):
    model = model_of(family).eval()
    arguments = {"input_ids": torch.arange(5, 15)[None], "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**arguments)
    plan(model, attention=True).apply()
    assert torch.equal(model.generate(**arguments), plain)


def test_capped_scores_and_other_implementations_are_left_alone():
    for family, implementation in (("gemma2", "eager"), ("llama", "eager")):
        model = tiny.build(family)
        made = plan(model, attention=True)
        made.apply()
        assert model.config._attn_implementation == implementation
    model = tiny.build("gemma2")
    model.config._attn_implementation = "sdpa"
    assert "" not in {r.path for r in plan(model, attention=True).replacements}


def test_a_copy_and_a_later_choice_are_independent():
    model = model_of("llama")
    made = plan(model, attention=True)
    made.apply()
    twin = copy.deepcopy(model)
    made.undo()
    assert twin.config._attn_implementation == packed_attention.NAME
    made.apply()
    model.set_attn_implementation("eager")
    made.undo()
    assert model.config._attn_implementation == "eager"
