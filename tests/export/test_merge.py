import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from unsloth import FastLanguageModel
from unsloth.core.errors import AdapterError, ConfigError, ExportError
from unsloth.export import merge, verify
from unsloth.export.merge import MergeOptions, merged_tensors
from unsloth.train.allocations import Allocations


def adapted(folder, precision="load_in_16bit", second=None, **options):
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=torch.float32, **{precision: True}
    )
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    if second:
        model.add_adapter("second", model.peft_config["default"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.05)
            elif "lora_magnitude" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def weights(model, **options):
    return dict(merged_tensors(model, torch.float32, MergeOptions(**options)))


def base_weights(model):
    with torch.no_grad():
        return {
            name.replace(".base_layer", "").replace(".original_module", ""): parameter.clone()
            for name, parameter in model.get_base_model().named_parameters()
            if not any(part in name for part in ("lora_", "modules_to_save"))
        }


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 7}])
def test_the_scale_multiplies_what_the_adapter_changes(tiny, kind):
    model = adapted(tiny("llama", tied=False), **kind)
    base, full = base_weights(model), weights(model)
    for options in ({"adapter_scale": 0.5}, {"base_weight": 0.5}, {"adapter_scale": 1.5, "base_weight": 2 / 3}):
        for name, tensor in weights(model, **options).items():
            assert torch.allclose(tensor, base[name] + 0.5 * (full[name] - base[name]), atol=1e-6), (options, name)
    changed = [name for name in base if not torch.equal(base[name], full[name])]
    assert len(changed) == 14


@pytest.mark.parametrize("tied", [True, False])
def test_weights_trained_in_full_are_averaged_but_not_scaled(tiny, tied):
    model = adapted(tiny("llama", tied=tied), target_modules=["q_proj", "embed_tokens", "lm_head"])
    base, full = base_weights(model), weights(model)
    trained = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert ("lm_head.weight" in full) is not tied  # tied copies are trained as one
    averaged, scaled = weights(model, base_weight=0.25), weights(model, adapter_scale=0.25)
    for name in trained:
        assert not torch.allclose(full[name], base[name], atol=1e-3)
        assert torch.allclose(averaged[name], 0.25 * base[name] + 0.75 * full[name], atol=1e-6)
        assert torch.equal(scaled[name], full[name])


def test_several_adapters_are_weighted_by_name(tiny):
    model = adapted(tiny(), second=True)
    base = base_weights(model)
    first, second = weights(model, adapters={"default": 1.0}), weights(model, adapters={"second": 1.0})
    both = weights(model, adapters={"default": 0.7, "second": -0.2})
    for name, tensor in both.items():
        change = 0.7 * (first[name] - base[name]) - 0.2 * (second[name] - base[name])
        assert torch.allclose(tensor, base[name] + change, atol=1e-6), name
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(model).items())  # the active one


def test_what_cannot_be_merged_is_an_error(tiny):
    model = adapted(tiny())
    with pytest.raises(AdapterError, match=r"no such adapter: got 'other'. It has: default"):
        weights(model, adapters={"other": 1.0})
    for wrong in ({"adapter_scale": math.nan}, {"base_weight": 1}, {"base_weight": -0.1}, {"adapters": {}}):
        with pytest.raises(ConfigError):
            MergeOptions(**wrong)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = math.inf
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        weights(model)


def test_a_full_fine_tune_is_averaged_with_its_files(tiny):
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, full_finetuning=True
    )
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    for name, tensor in weights(model, base_weight=0.3).items():
        trained = model.get_parameter(name).detach()
        assert torch.allclose(tensor, 0.7 * trained + 0.3 * base[name], atol=1e-6), name


@pytest.mark.parametrize("precision", ["load_in_16bit", "load_in_4bit", "load_in_8bit"])
def test_one_tensor_is_held_at_a_time(tiny, precision, monkeypatch):
    model = adapted(tiny("llama", tied=False), precision)
    monkeypatch.setattr(merge, "_BLOCK", 512)  # elements, so that blocks are small beside these tensors
    sizes = [parameter.numel() for parameter in merge.skeleton(model).parameters()]
    counted = Allocations(lambda tensor: "merging")
    counted.exclude([*model.parameters(), *model.buffers()])
    with counted:
        for _ in merge.model_tensors(model, torch.bfloat16):
            pass
    # Bytes an element: 4 of the weight dequantized to float32, 2 of the result, 2 of the one before it; and a few
    # blocks in float32.
    bound = 8 * max(sizes) + 6 * 4 * 512
    assert counted.peak()["merging"] < bound < 2 * sum(sizes)


def test_adapters_that_are_active_together_are_merged_together(tiny):
    model = adapted(tiny(), second=True)
    apart = [weights(model, adapters={name: 1.0}) for name in ("default", "second")]
    base = base_weights(model)
    model.base_model.set_adapter(["default", "second"])
    for name, tensor in weights(model).items():
        changes = sum(part[name] - base[name] for part in apart)
        assert torch.allclose(tensor, base[name] + changes, atol=1e-6), name
    check = verify.LayerCheck(torch.float32, torch.float32, merge.UNCHANGED)
    dict(merged_tensors(model, torch.float32, observe=check))
    assert check.count == 14


def test_an_adapter_with_a_bias_of_its_own(tiny):
    for family, bias in (("qwen2", True), ("llama", False)):  # Qwen2's q, k and v have one to add it to
        plain = AutoModelForCausalLM.from_pretrained(tiny(family))
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
        model = get_peft_model(plain, config).eval()
        check = verify.LayerCheck(torch.float32, torch.float32, merge.UNCHANGED)
        if not bias:
            with pytest.raises(ExportError, match="has a bias, and the layer that it adapts has none"):
                dict(merged_tensors(model, torch.float32, observe=check))
            continue
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].bias)
        merged = dict(merged_tensors(model, torch.float32, observe=check))
        added = merged["model.layers.0.self_attn.q_proj.bias"] - layer.base_layer.bias
        assert torch.allclose(added, layer.scaling["default"] * layer.lora_B["default"].bias, atol=1e-6)
        assert check.count == 2


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_stacked_experts(kind, monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": None}
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        config = Qwen3MoeConfig(**sizes, **heads, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2)
        plain = Qwen3MoeForCausalLM(config)
    else:
        plain = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2))
    model = get_peft_model(
        copy.deepcopy(plain),
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    ).eval()
    monkeypatch.setattr(merge, "_BLOCK", 1)  # one expert at a time
    merged = dict(merge.model_tensors(model, torch.float32))
    before = plain.model.layers[0].mlp.experts.down_proj.detach().clone()
    plain.load_state_dict(merged)
    assert not torch.equal(before, merged["model.layers.0.mlp.experts.down_proj"])
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        expected, actual = model(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    half = dict(merge.model_tensors(model, torch.float32, MergeOptions(adapter_scale=0.5)))
    middle = (before + merged["model.layers.0.mlp.experts.down_proj"]) / 2
    assert torch.allclose(half["model.layers.0.mlp.experts.down_proj"], middle, atol=1e-6)
