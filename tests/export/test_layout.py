import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from unsloth.export import layout
from unsloth.export.merge import merged_tensors, skeleton

TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "eos_token_id": 1,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def build(kind):
    if kind == "qwen3_moe":
        config = Qwen3MoeConfig(**TEXT, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2)
        return Qwen3MoeForCausalLM(config)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=3))
    if kind == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=3))
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "gemma3"])
def test_names_and_values_are_those_that_transformers_saves(kind, loaded, tmp_path):
    model = build(kind).to(torch.bfloat16)
    if loaded:  # such a model remembers the rules that it was loaded by
        model.save_pretrained(tmp_path / "first")
        model = type(model).from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    actual = list(merged_tensors(model))
    assert len(actual) == len(dict(actual)) and set(dict(actual)) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual)
    planned = layout.plan(skeleton(model))
    assert {p.name: (p.shape, p.dtype) for p in planned} == {n: (tuple(t.shape), t.dtype) for n, t in actual}


def test_only_one_layer_is_held_where_tensors_are_split():
    model = build("qwen3_moe").to(torch.bfloat16)
    given = []

    def watched():
        for name, tensor in model.named_parameters():
            given.append(name)
            yield name, tensor

    for name, _ in layout.in_checkpoint(skeleton(model), watched()):
        if ".layers.0." in name:
            assert not any(".layers.1." in other for other in given[:-1])
