"""Models whose values exceed float16's range train in it: without NaN, and with the gradients of float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from unsloth.layers import mlp
from unsloth.models import families
from unsloth.models.plan import plan
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny


def make(family, dtype):
    """A residual stream of about 80,000, and MLPs whose inner values are larger still."""
    model = tiny.build(family)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding.sign() * (3e4 + 1e4 * embedding.abs().clamp(max=1)))
        for name, parameter in model.named_parameters():
            if "up_proj" in name or "gate_proj" in name:
                parameter.mul_(100)
            if "down_proj" in name:
                parameter.mul_(2)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.half())
        embedding.copy_(embedding.half())
    model = tiny.adapt(model.to(dtype), resolve_targets(families.find(model), tiny.TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def run(model, dtype):
    ids = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    sizes = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(("mlp", "down_proj")):
            hooks.append(module.register_forward_hook(lambda m, a, y, n=name: sizes.update({n: y.abs().max().item()})))
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), grads, max(sizes.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_values_beyond_float16(family):
    exact = run(make(family, torch.float32), torch.float32)
    assert exact[2] > 65504, "the model is to exceed float16"
    plain = run(make(family, torch.float16), torch.float16)
    assert not torch.isfinite(plain[1]).all()
    model = make(family, torch.float16)
    made = plan(model, attention=False, whole=False)
    assert "rows in float32" in str(made)
    made.apply()
    found = run(model, torch.float16)
    assert torch.isfinite(found[1]).all()
    assert found[0] == pytest.approx(exact[0], rel=5e-3)
    cosine = torch.nn.functional.cosine_similarity(found[1].double(), exact[1].double(), dim=0)
    assert cosine > 0.999


def test_sums_of_the_last_product_stay_in_range():
    down = torch.nn.Linear(1536, 8, bias=False).half()
    down.weight.data.fill_(0.1)
    inputs = [torch.nn.Linear(4, 1536, bias=False).half() for _ in range(2)]
    for module in inputs:
        module.weight.data.fill_(250.0)
    x = torch.ones(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = mlp._scaled([*inputs, down], x, "silu")
    (1e-6 * y.sum()).backward()  # the true gradient itself exceeds float16
    exact = 1536 * down.weight[0, 0].double() * 1000.0**2
    assert y.dtype == torch.float32 and (y / exact - 1).abs().max() < 2e-3
    assert torch.isfinite(x.grad).all()


def test_generation_in_float16_is_as_it_was():
    model = tiny.build("llama").half().eval()
    ids = torch.randint(3, 256, (1, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        made = plan(model, attention=False, whole=False)
        made.apply()
        found = model(input_ids=ids, use_cache=False).logits
    assert found.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)
