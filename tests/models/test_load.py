import json
import shutil

import pytest
import torch

from unsloth import FastLanguageModel
from unsloth.core.errors import AdapterError, CheckpointError, ConfigError, ModelError, ModelNotFoundError
from unsloth.models import load


def test_one_precision_is_chosen():
    assert load.choose_precision(None, None, None, None) == "4bit"
    assert load.choose_precision(None, True, None, None) == "8bit"
    assert load.choose_precision(False, False, False, False) == "16bit"
    assert load.choose_precision(False, None, None, True) == "full"
    with pytest.raises(ConfigError, match="load_in_4bit=True, full_finetuning=True"):
        load.choose_precision(True, None, None, True)


@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"])
def test_every_precision_loads_and_runs(tiny, precision):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, **{precision: True}
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_returns_tokens_by_default(tiny):
    _, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert len(tokens) > 10


def test_adapters_are_float32_and_load_again(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128, dtype=torch.bfloat16)
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), max_seq_length=128, dtype=torch.bfloat16)
    ids = torch.arange(4, 40)[None]
    model.eval(), again.eval()
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_broken_folders_are_named(tiny, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such model folder"):
        FastLanguageModel.from_pretrained("./nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FastLanguageModel.from_pretrained(str(tmp_path))
    broken = shutil.copytree(tiny(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        FastLanguageModel.from_pretrained(str(broken))
    weights.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        FastLanguageModel.from_pretrained(str(broken))
    weights.write_bytes(content)
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing"):
        FastLanguageModel.from_pretrained(str(broken), load_in_16bit=True)


def test_no_network_is_one_clear_sentence():
    with pytest.raises(ModelError, match="someone/some-model"):
        FastLanguageModel.from_pretrained("someone/some-model")


def test_bad_adapter_options(tiny):
    model, _ = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128, load_in_16bit=True)
    with pytest.raises(AdapterError, match="q_proj"):
        FastLanguageModel.get_peft_model(model, target_modules=["q_porj"])
    with pytest.raises(AdapterError, match=r"PEFT refuses.*got 'no_such\.\*'"):
        FastLanguageModel.get_peft_model(model, target_modules="no_such.*")
    with pytest.raises(ConfigError, match="rank"):
        FastLanguageModel.get_peft_model(model, r=0)
    adapted = FastLanguageModel.get_peft_model(model)
    with pytest.raises(AdapterError, match="already"):
        FastLanguageModel.get_peft_model(adapted)


def test_dora_on_int8_is_refused_on_the_cpu(tiny):
    model, _ = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128, load_in_8bit=True, device_map="cpu")
    with pytest.raises(AdapterError, match="DoRA"):
        FastLanguageModel.get_peft_model(model, use_dora=True)


def test_a_misspelt_argument_names_the_nearest(tiny):
    with pytest.raises(ConfigError, match="Did you mean load_in_4bit"):
        FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=128, load_in_4bits=True)
