"""Every family with its plan against plain transformers and PEFT; and every field of every spec is needed.

The judge is the very same model before the plan is applied: transformers' and PEFT's own forwards and autograd.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from unsloth.core.errors import PlanError, UnslothError
from unsloth.models import families, reference
from unsloth.models.plan import plan
from unsloth.models.spec import HeadNorm, ModelSpec, Scale, Window, resolve_targets

sys.path.insert(0, str(Path(__file__).parent))
import tiny_families as tiny

BLOCK = ("", ".self_attn", ".mlp", ".input_layernorm")
SANDWICH = (*BLOCK, ".post_attention_layernorm", ".post_feedforward_layernorm")
GLM4 = (*BLOCK, ".post_self_attn_layernorm", ".post_mlp_layernorm")
# Their gate and up, or q, k and v as well, are one layer.
ADAPTED_LAYERS = {"phi3": 4, "glm": 6, "glm4": 6}


def expected_paths(family: str, adapted: bool) -> set[str]:
    """All that a plan must replace, written down apart from the specs."""
    parts = SANDWICH if family in ("gemma2", "gemma3") else GLM4 if family == "glm4" else BLOCK
    parts = (*parts, ".self_attn.o_proj") if adapted else parts
    return {"model.norm"} | {f"model.layers.{i}{part}" for i in range(2) for part in parts}


def make(family: str, precision: str) -> torch.nn.Module:
    model = tiny.build(family)
    spec = families.find(model)
    assert spec is not None
    if precision == "qlora":
        tiny.quantize(model)
    return model if precision == "full" else tiny.adapt(model, resolve_targets(spec, tiny.TARGETS))


@pytest.mark.parametrize("precision", ["lora", "qlora", "full"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_those_of_plain_libraries(family, precision):
    model = make(family, precision)
    plain = tiny.run(model)
    made = plan(model)
    assert made.family == family.split(",")[0]
    assert {r.path for r in made.replacements} == expected_paths(family, precision != "full")
    made.apply()
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert [r.path for r in made.replacements if r.fast.calls != 1 or r.fast.declined] == []
    partly = {reason for r in made.replacements for reason in r.fast.partly}
    if precision == "full":
        assert all("weights that are trained" in reason for reason in partly)
    else:
        assert partly == set()
        assert len(plain[1]) == 2 * 2 * ADAPTED_LAYERS.get(family, 7)
    made.undo()
    again = tiny.run(model)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][name], grad) for name, grad in plain[1].items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_spec_alone_says_how_to_compute_the_logits(family):
    model = tiny.build(family).eval()
    ids = tiny.batch()["input_ids"][:1]
    with torch.no_grad():
        expected = model(ids).logits
    difference = (reference.logits(model, families.find(model), ids) - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()


# What an absent option becomes: something that exists, and changes the result.
_INVENTED = {
    "softcap": "num_key_value_heads",
    "logits_softcap": "num_key_value_heads",
    "window": Window("num_key_value_heads", by_layer_type=False),
    "head_norm": HeadNorm(),
    "residual_scale": Scale("num_attention_heads"),
    "embedding_scale": Scale("num_attention_heads"),
    "logits_scale": Scale("num_attention_heads"),
    "attention_norm": "input_layernorm",
    "mlp_input_norm": "input_layernorm",
    "mlp_norm": "input_layernorm",
    "attention_dropout": "input_layernorm",
    "mlp_dropout": "input_layernorm",
    "rotary_switch": "absent",
    "switch": "absent",
}


_OPPOSITE = {"rms": "layer", "layer": "rms", "halves": "neighbours", "neighbours": "halves"}
_OPPOSITE["neighbours, tables in halves"] = "neighbours"
REFUSED = object()


def replaced(value: object, field: str, changed: object) -> object:
    """``value`` with another field, or REFUSED where that is no valid spec."""
    if changed is REFUSED:
        return REFUSED
    try:
        return dataclasses.replace(value, **{field: changed})
    except PlanError:
        return REFUSED


def mutations(value: object, name: str = ""):
    """(field, another value) for every field of a spec, however deep; see :func:`replaced`."""
    if name in _INVENTED or name == "input_norm":
        yield name, _INVENTED[name] if value is None else None
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for label, changed in mutations(getattr(value, field.name), field.name):
                yield f"{name}.{label}".lstrip("."), replaced(value, field.name, changed)
    elif name == "model_types":
        for i, model_type in enumerate(value):
            if model_type in CONFIG_MAPPING_NAMES:  # older transformers lacks some, so that nothing here has them
                yield f"{name}[{i}]", value[:i] + value[i + 1 :]
    elif value is not None:
        yield name, other(value)


def other(value: object) -> object:
    """Another value of the same kind: a name that does not exist, another number, another order."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return _OPPOSITE.get(value, f"{value}_absent")
    if isinstance(value, tuple):
        return value[::-1] if len(value) > 1 else (f"{value[0]}_absent",)
    assert isinstance(value, float), f"no mutation for {value!r}"
    return value + 0.25


@torch.no_grad()
def passes(model: torch.nn.Module, spec: ModelSpec, expected: dict) -> bool:
    """The checks above, without gradients: structure, swapped model, reference, norms of 16-bit inputs."""
    try:
        made = plan(model, family=spec)
        if made.family != expected["name"] or model.config.model_type not in spec.model_types:
            return False
        if {r.path for r in made.replacements} != expected["paths"]:
            return False
        made.apply()
        try:
            torch.manual_seed(5)
            loss = model(**tiny.batch(), use_cache=False).loss
            rounded = model.model.norm(expected["sixteen"])
        finally:
            made.undo()
        logits = reference.logits(model, spec, expected["ids"])
    except (UnslothError, AttributeError, KeyError, TypeError, RuntimeError):
        return False  # a wrong spec may also fail loudly
    near = torch.allclose(loss, expected["loss"], rtol=1e-5, atol=0)
    near &= torch.allclose(logits, expected["logits"], rtol=0, atol=1e-5 * expected["logits"].abs().max().item())
    return near and rounded.dtype == expected["rounded"].dtype and bool((rounded == expected["rounded"]).all())


def plain_results(family: str) -> tuple[torch.nn.Module, ModelSpec, dict]:
    """A model, its spec, and what :func:`passes` compares with."""
    model = tiny.build(family)
    spec = families.find(model)
    ids = tiny.batch()["input_ids"][:1]
    sixteen = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        torch.manual_seed(5)
        expected = {"loss": model(**tiny.batch(), use_cache=False).loss, "rounded": model.model.norm(sixteen)}
        expected["logits"] = model.eval()(ids).logits
    model.train()
    expected |= {"name": spec.name, "paths": expected_paths(family, False), "ids": ids, "sixteen": sixteen}
    return model, spec, expected


@pytest.mark.parametrize("name", dict.fromkeys(family.split(",")[0] for family in tiny.FAMILIES))
def test_every_field_of_a_spec_is_needed(name):
    members = [plain_results(family) for family in tiny.FAMILIES if family.split(",")[0] == name]
    assert all(passes(*member) for member in members)
    tried = list(mutations(members[0][1]))
    assert len(tried) > 40
    survivors = [
        label
        for label, spec in tried
        if spec is not REFUSED and all(passes(model, spec, plain) for model, _, plain in members)
    ]
    assert survivors == []
