"""M05: an adapter, merged into 16 bits and loaded again by plain transformers, is the model that was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel, add_new_tokens
from unsloth.export import layout, merge, shards

CASES = {
    "tied": (True, {}),
    "untied": (False, {}),
    "modules_to_save": (True, {"modules_to_save": ["lm_head"]}),
    "trained in full": (False, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    "rslora": (True, {"use_rslora": True, "lora_alpha": 8}),
    "dora": (True, {"use_dora": True}),
    "resized": (True, {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "bias": (False, {"bias": "lora_only"}),
}


@pytest.fixture(params=CASES)
def model(request, tiny):
    tied, options = CASES[request.param]
    family = "qwen2" if request.param == "bias" else "llama"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny(family, tied)), max_seq_length=64, dtype=torch.float32, load_in_16bit=True
    )
    if request.param == "resized":
        add_new_tokens(model, tokenizer, ["<call>", "</call>"])
        assert model.get_input_embeddings().weight.shape[0] == 320
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), tokenizer


def test_it_predicts_the_same(model, tmp_path):
    model, tokenizer = model
    ids = torch.tensor([tokenizer("What is 3 plus 4? <call>3 + 4</call>").input_ids])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    exact = tmp_path / "float32"
    outline = merge.skeleton(model, torch.float32)
    outline.save_pretrained(exact, state_dict={})
    shards.write(exact, layout.plan(outline), merge.merged_tensors(model, torch.float32), 10**9)
    plain, info = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    model.save_pretrained_merged(tmp_path / "saved", tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.dtype == torch.bfloat16
    rounded = dict(saved.named_parameters())
    for name, parameter in plain.named_parameters():  # rounded once, to the nearest
        assert torch.equal(rounded[name], parameter.to(torch.bfloat16)), name
