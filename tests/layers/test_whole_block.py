"""A block as one function against the same block of separate functions, and against plain transformers and PEFT."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth.models import families
from unsloth.models.plan import plan
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny

WHOLE = ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "helium", "ernie4_5"]
PACKED = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]


def make(family: str, dtype: torch.dtype = torch.float64, quantized: bool = False, **options) -> torch.nn.Module:
    model = tiny.build(family)
    if quantized:
        tiny.quantize(model)
    model = tiny.adapt(model, resolve_targets(families.find(model), tiny.TARGETS), **options)
    return model if quantized else model.to(dtype)


def run(model, implementation="unsloth", packed=True, rows=2, checkpoint=False):
    """Loss, adapter gradients, and the gradient of the embedding's output."""
    inner = model.get_base_model()
    inner.config._attn_implementation = implementation
    if checkpoint:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 256, (rows, 19), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([PACKED if packed else list(range(19))] * rows)
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


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_equal_to_separate_functions(family, packed, checkpoint):
    model = make(family)
    separate = plan(model, attention=True, whole=False)
    separate.apply()
    expected = run(model, packed=packed)
    assert not any(r.fast.partly for r in blocks(separate))
    separate.undo()
    made = plan(model, attention=True, whole=True)
    made.apply()
    found = run(model, packed=packed, checkpoint=checkpoint)
    assert all(r.fast.calls == 1 and not r.fast.partly for r in blocks(made)), str(made)
    assert tiny.worst(found, expected) < 1e-10
