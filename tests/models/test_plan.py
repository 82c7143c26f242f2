"""A plan changes one model, as a whole, and takes itself back; whatever PEFT does with the model goes on working."""

from __future__ import annotations

import copy
import functools
import io
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

from unsloth.core.errors import AdapterError, PlanError
from unsloth.models import adapters, families, record
from unsloth.models.plan import install, plan, remove, suspended
from unsloth.models.spec import resolve_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny_families as tiny


def adapted(family: str = "llama", **options):
    return tiny.adapt(tiny.build(family), tiny.TARGETS, **options)


def forwards(model):
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def fast_calls(made):
    return sum(r.fast.calls for r in made.replacements)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=tiny.batch()["input_ids"], use_cache=False, **more).logits


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_planning_changes_nothing_and_prints_what_would_change():
    model = adapted()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    made = plan(model)
    assert before == {name: dict(module.__dict__) for name, module in model.named_modules()}
    text = str(made)
    assert "LlamaForCausalLM (family llama, not applied)" in text
    assert "model.layers.{0..1}.mlp" in text and "LlamaMLP" in text and "gate_proj, up_proj, down_proj together" in text
    left = text.split("Left alone")[1]
    assert "model.embed_tokens" in left and "a look-up" in left and "lm_head" in left


def test_calls_are_counted_and_shown():
    model = adapted(lora_dropout=0.5)
    made = install(model)
    tiny.run(model)
    assert "dropout on the adapter's input" in str(made)
    mlp = next(r for r in made.replacements if r.path.endswith("0.mlp"))
    assert mlp.fast.calls == 1 and sum(mlp.fast.partly.values()) == 1


def test_undo_leaves_no_trace():
    model = adapted()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    install(model)
    remove(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


def test_another_model_of_the_same_class_is_not_touched():
    ours, other = adapted(), adapted()
    plain = tiny.run(other)
    made = install(ours)
    assert set(forwards(other).values()) == {None}
    tiny.run(ours)
    calls = fast_calls(made)
    again = tiny.run(other)
    assert fast_calls(made) == calls
    assert torch.equal(again[0], plain[0])


def test_planning_twice_is_refused():
    model = adapted()
    first, second = plan(model), plan(model)
    first.apply()
    with pytest.raises(PlanError, match="applied to it already"):
        plan(model)
    before = forwards(model)
    with pytest.raises(PlanError, match="has been replaced already"):
        second.apply()
    assert forwards(model) == before


def test_install_takes_the_place_of_an_earlier_plan():
    model = adapted()
    first = install(model)
    second = install(model)
    assert model.unsloth_plan is second and first is not second and second.applied


def test_two_replacements_of_one_part_are_refused():
    model = adapted()
    extra = plan(model).replacements[0]
    with pytest.raises(PlanError, match="want the same part"):
        plan(model, also=[extra])


def test_a_plan_carries_other_replacements_and_applies_all_or_none():
    class Extra:
        path, current, new, reason, log = "lm_head", "Linear", "head", "less memory", []

        def __init__(self, fails=False):
            self.fails, self.log = fails, []

        def apply(self):
            if self.fails:
                raise PlanError("no")
            self.log.append("apply")

        def undo(self):
            self.log.append("undo")

    model, extra = adapted(), Extra()
    made = plan(model, also=[extra])
    assert "lm_head" in str(made) and "less memory" in str(made)
    made.apply()
    made.undo()
    assert extra.log == ["apply", "undo"]
    with pytest.raises(PlanError, match="no"):
        plan(model, also=[Extra(fails=True)]).apply()
    assert set(forwards(model).values()) == {None}


def test_a_forward_that_someone_wrapped_later_is_not_undone():
    model = adapted()
    made = install(model)
    module = model.base_model.model.model.layers[1].mlp
    ours = module.forward
    module.forward = functools.partial(lambda f, *a, **k: f(*a, **k), ours)
    before = forwards(model)
    with pytest.raises(PlanError, match="layers.1.mlp was wrapped"):
        made.undo()
    assert forwards(model) == before
    module.forward = ours
    made.undo()
    assert set(forwards(model).values()) == {None}


def test_a_forward_that_someone_replaced_before_is_left_alone():
    model = adapted()
    module = model.base_model.model.model.layers[0].mlp
    module.forward = functools.partial(type(module).forward, module)
    made = plan(model)
    assert "model.layers.0.mlp" not in {r.path for r in made.replacements}
    assert [(part.path, part.why) for part in made.left_alone if part.path.endswith("mlp")] == [
        ("model.layers.0.mlp", "its forward was replaced by something else")
    ]
    # its linear layers are then swapped one by one
    assert "model.layers.0.mlp.down_proj" in {r.path for r in made.replacements}


def test_a_model_without_what_its_spec_names_is_refused():
    model = tiny.build("llama")
    del model.model.layers[1].mlp
    with pytest.raises(PlanError, match=r"layers\.1\.mlp"):
        plan(model)


def test_a_suspended_plan_is_off_and_comes_back():
    model = adapted()
    made = install(model)
    calls = []
    handle = model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with suspended(model):
        assert not made.applied
        with suspended(model):
            logits(model)
        assert not made.applied
        assert calls == [1]
    handle.remove()
    assert made.applied
    with pytest.raises(RuntimeError), suspended(model):
        raise RuntimeError
    assert made.applied
    with suspended(tiny.build("llama")):
        pass


def test_hooks_on_bypassed_layers_still_fire():
    model = adapted()
    plain = tiny.run(model)
    made = install(model)
    seen = []
    layers = model.base_model.model.model.layers
    for module in (
        layers[0].self_attn.q_proj,
        layers[0].mlp.up_proj.base_layer,
        layers[1].mlp.down_proj.lora_A.default,
    ):
        module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    norm = layers[0].post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert len(seen) == 4
    assert any("hooks" in reason for r in made.replacements for reason in r.fast.partly)


def test_a_copy_is_bound_to_its_own_weights_and_has_its_own_plan():
    model = adapted()
    plain = tiny.run(model)
    made = install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert not close(tiny.run(twin)[0], plain[0])
    assert twin.unsloth_plan.applied and twin.unsloth_plan is not made
    calls = fast_calls(made)
    tiny.run(twin)
    assert fast_calls(made) == calls
    twin.unsloth_plan.undo()
    assert made.applied
    assert tiny.worst(tiny.run(model), plain) < 1e-5


def test_a_pickled_model_comes_back_without_the_plan_and_can_have_it_again():
    model = adapted()
    plain = tiny.run(model)
    install(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert not back.unsloth_plan.applied
    assert torch.equal(tiny.run(back)[0], plain[0])
    back.unsloth_plan.apply()
    assert tiny.worst(tiny.run(back), plain) < 1e-5
    assert fast_calls(back.unsloth_plan) > 0


def test_the_state_dict_is_that_of_peft(tmp_path):
    model = adapted()
    names = list(model.state_dict())
    install(model)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("precision", ["lora", "qlora"])
def test_merging_and_unloading(precision):
    model = tiny.build("llama")
    if precision == "qlora":
        tiny.quantize(model)
    model = tiny.adapt(model, tiny.TARGETS).eval()
    plain_base = copy.deepcopy(model).unload()
    plain = copy.deepcopy(model).merge_and_unload()
    install(model)
    base = logits(copy.deepcopy(model).unload())
    assert close(base, logits(plain_base))
    merged = model.merge_and_unload()
    assert close(logits(merged), logits(plain))
    assert not close(logits(merged), base)
    merged.unsloth_plan.undo()
    assert set(forwards(merged).values()) == {None}


def test_a_merged_and_a_disabled_adapter():
    model = adapted().eval()
    expected, reference = logits(model), None
    with model.disable_adapter():
        reference = logits(model)
    install(model)
    with model.disable_adapter():
        assert close(logits(model), reference)
    assert close(logits(model), expected) and not close(expected, reference)
    model.merge_adapter()
    assert close(logits(model), expected)
    with model.disable_adapter():  # PEFT takes the merged adapter out again
        assert close(logits(model), reference)
    assert close(logits(model), expected)


def test_several_adapters():
    model = adapted().eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_(std=0.2)
    choices = ("default", "second", ["default", "second"])

    def by_choice():
        found = []
        for choice in choices:
            model.base_model.set_adapter(choice)
            found.append(logits(model))
        model.base_model.set_adapter("default")
        return [*found, logits(model, adapter_names=["default", "second"])]

    plain = by_choice()
    made = install(model)
    ours = by_choice()
    assert all(close(a, b) for a, b in zip(ours, plain, strict=True))
    assert not any(close(plain[i], plain[j]) for i in range(4) for j in range(i))
    assert any("several active adapters" in reason for r in made.replacements for reason in r.fast.partly)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_dropout": 0.3}, {"bias": "lora_only"}, {"lora_bias": True}, {"use_rslora": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_fast_path_does_not_know_goes_to_peft(options):
    model = tiny.adapt(tiny.build("llama, biases"), tiny.TARGETS, **options)
    plain = tiny.run(model)
    install(model)
    assert tiny.worst(tiny.run(model), plain) < 1e-5


def test_8_bit_layers_are_called_one_by_one_and_give_the_same():
    import bitsandbytes as bnb

    model = tiny.build("llama")
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "layers" in name:
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.is_loaded_in_8bit = True
    model = tiny.adapt(model, tiny.TARGETS)
    plain = tiny.run(model)
    made = install(model)
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert "Linear8bitLt" in str(made).split("Left alone")[1]
    assert {r.path.rsplit(".", 1)[-1] for r in made.replacements} >= {"self_attn", "mlp", "input_layernorm"}


def test_some_targets_only():
    model = tiny.adapt(tiny.build("qwen3"), ["q_proj", "v_proj", "up_proj"])
    plain = tiny.run(model)
    made = install(model)
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert not any(r.fast.partly or r.fast.declined for r in made.replacements)
    assert not any(r.path.endswith("o_proj") for r in made.replacements)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation):
    model = adapted("qwen3").eval()
    model.base_model.model.set_attn_implementation(implementation)
    ids = tiny.batch()["input_ids"][:1]
    position_ids = torch.cat([torch.arange(7), torch.arange(5)])[None]

    def packed():
        with torch.no_grad():
            return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits

    plain = packed()
    made = install(model)
    assert close(packed(), plain)
    with torch.no_grad():
        alone = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :7], ids[:, 7:])]
    assert close(torch.cat(alone, 1), plain)
    assert fast_calls(made) > 0


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_gives_the_same_and_really_recomputes(on):
    model = adapted("gemma2")
    plain = tiny.run(model)
    made = install(model)
    inner = model.base_model.model
    if on:
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    mlps = [r.fast.calls for r in made.replacements if r.path.endswith(".mlp")]
    assert mlps == [2 if on else 1] * 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3", "cohere"])
def test_generation_with_a_cache_and_left_padding_gives_the_same(family):
    base = tiny.build(family)
    model = tiny.adapt(base, resolve_targets(families.find(base), tiny.TARGETS)).eval()
    ids = torch.arange(5, 15).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    arguments |= {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**arguments)
    made = install(model)
    ours = model.generate(**arguments)
    assert torch.equal(ours.sequences, plain.sequences)
    expected = torch.stack(plain.logits)
    assert (torch.stack(ours.logits) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert fast_calls(made) > 100


def test_a_cache_under_a_later_name_is_left_to_the_original_forward():
    """One that was overlooked would make every token see itself alone, without a word."""
    model = adapted()
    install(model)
    inner = model.get_base_model()
    layer = inner.model.layers[0].self_attn
    hidden = torch.randn(1, 3, inner.config.hidden_size)
    tables = inner.model.rotary_emb(hidden, torch.arange(3)[None])
    with torch.no_grad():
        layer(hidden_states=hidden, position_embeddings=tables, attention_mask=None, store=transformers.DynamicCache())
    assert layer.unsloth_fast.declined == {"a cache under a name that is not known": 1}


def test_a_compiled_model_gives_the_same():
    model = adapted()
    plain = tiny.run(model)
    made = install(model)
    compiled = torch.compile(model, backend="eager")
    ours = tiny.run(compiled)
    ours = ours[0], {name.removeprefix("_orig_mod."): grad for name, grad in ours[1].items()}
    assert tiny.worst(ours, plain) < 1e-5
    assert fast_calls(made) == 0  # compiled code is the original's
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert fast_calls(made) > 0


@pytest.mark.parametrize("precision", ["lora", "qlora"])
def test_autocast_keeps_float32_adapters_and_gradients(precision):
    model = tiny.build("llama")
    if precision == "qlora":
        tiny.quantize(model)
    model = tiny.adapt(model, tiny.TARGETS)
    exact = tiny.run(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        plain = tiny.run(model)
        made = install(model)
        ours = tiny.run(model)
    assert all(grad.dtype == torch.float32 for grad in ours[1].values())
    assert not any(r.fast.partly or r.fast.declined for r in made.replacements)
    assert tiny.distance(ours, exact) <= 2 * tiny.distance(plain, exact)


def test_a_family_without_a_spec_gets_its_linear_layers():
    config = transformers.Olmo2Config(**{k: v for k, v in tiny.COMMON.items() if k != "head_dim"})
    model = transformers.Olmo2ForCausalLM(config)
    tiny.randomize(model)
    model = tiny.adapt(model, tiny.TARGETS)
    plain = tiny.run(model)
    made = install(model)
    assert made.family is None
    assert {r.path.rsplit(".", 1)[-1] for r in made.replacements} == set(tiny.TARGETS) and len(made.replacements) == 14
    assert "no spec for olmo2" in str(made)
    assert tiny.worst(tiny.run(model), plain) < 1e-5
    assert all(r.fast.calls == 1 and not r.fast.declined for r in made.replacements)


def test_loading_and_adapting_apply_a_plan_unless_told_otherwise(request):
    from unsloth import FastLanguageModel

    def load(**more):
        return FastLanguageModel.from_pretrained(
            str(request.getfixturevalue("tiny")("qwen2")),
            max_seq_length=64,
            dtype=torch.float32,
            fused_head=False,
            **more,
        )[0]

    def adapt(model, **more):
        return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False, **more)

    loaded = load(load_in_4bit=True)
    first = loaded.unsloth_plan
    assert first.applied and first.family == "qwen2"
    model = adapt(loaded)
    assert model.unsloth_plan.applied and model.unsloth_plan is not first
    assert {r.path.split(".")[-1] for r in model.unsloth_plan.replacements} >= {"self_attn", "mlp", "o_proj"}
    model.unsloth_plan.undo()
    assert set(forwards(model).values()) == {None}
    for model in (load(load_in_16bit=True, fast_layers=False), adapt(load(load_in_16bit=True), fast_layers=False)):
        assert not hasattr(model, "unsloth_plan") and set(forwards(model).values()) == {None}
    assert not hasattr(adapt(load(load_in_16bit=True, fast_layers=False)), "unsloth_plan")
    assert adapt(load(load_in_16bit=True, fast_layers=False), fast_layers=True).unsloth_plan.applied
    assert adapt(load(full_finetuning=True)).unsloth_plan.applied


def test_code_that_is_not_transformers_own_gets_the_generic_plan():
    class Mine(transformers.LlamaForCausalLM):
        pass

    assert families.find(Mine(transformers.LlamaConfig(**tiny.COMMON))) is None


def test_targets_resolve_through_the_family():
    phi3, llama = families.find(tiny.build("phi3")), families.find(tiny.build("llama"))
    assert resolve_targets(phi3, ["q_proj", "k_proj", "v_proj", "o_proj"]) == ["qkv_proj", "o_proj"]
    assert resolve_targets(phi3, tiny.TARGETS) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert resolve_targets(phi3, ["qkv_proj", "lm_head"]) == ["qkv_proj", "lm_head"]
    assert resolve_targets(llama, tiny.TARGETS) == tiny.TARGETS
    assert resolve_targets(None, ["c_attn", "c_attn"]) == ["c_attn"]


def test_documented_target_names_adapt_fused_layers_and_unknown_names_are_refused():
    def phi3():
        model = tiny.build("phi3")
        loaded = record.LoadRecord("phi3", None, "16bit", torch.float32, 64, False, 0)
        record.attach(model, loaded)
        return model

    options = adapters.AdapterOptions(target_modules=tiny.TARGETS, use_gradient_checkpointing=False)
    names = {name for name, _ in adapters.add(phi3(), options).named_parameters() if "lora_A" in name}
    assert len(names) == 2 * 4 and sum("qkv_proj" in name for name in names) == 2
    with pytest.raises(AdapterError, match="qkv_projection"):
        adapters.add(phi3(), adapters.AdapterOptions(target_modules=["q_proj", "qkv_projection"]))
