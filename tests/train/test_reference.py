import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from unsloth.train.reference import adapters_off

IDS = torch.arange(4, 16)[None]


def adapted(folder, **changes):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], **changes}
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": None}, {"use_dora": True}, {"bias": "all"}])
def test_it_computes_what_peft_computes_and_leaves_no_trace(tiny, changes):
    torch.manual_seed(1)
    model = adapted(tiny(), **changes)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = model(IDS).logits
    with model.disable_adapter():
        expected = model(IDS).logits
    with adapters_off(model):
        found = model(IDS).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
    assert torch.equal(model(IDS).logits, before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


@torch.no_grad()
def test_an_error_inside_turns_them_on_again(tiny):
    model = adapted(tiny())
    before = model(IDS).logits
    with pytest.raises(ValueError), adapters_off(model):
        raise ValueError
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_what_was_off_before_stays_off(tiny):
    model = adapted(tiny())
    model.base_model.disable_adapter_layers()
    before = model(IDS).logits
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_learned_prompts_are_left_to_peft(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    expected = model(IDS).logits
    model = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with adapters_off(model):
        assert torch.equal(model(IDS).logits, expected)
