"""Adapters: layers trained in full, parts chosen by what they do, folders that plain PEFT wrote."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel, FastModel, SFTConfig, SFTTrainer
from unsloth.core.errors import AdapterError, ConfigError

IDS = torch.arange(4, 60)[None]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder, **options):
    arguments = {"dtype": torch.float32, "load_in_16bit": True, **options}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **arguments)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def stir(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("full", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_embeddings_as_targets_are_trained_in_full(tiny, tmp_path, tied, full):
    folder = tiny("llama", tied)
    model, tokenizer = load(folder)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=[*SEVEN, *full])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == (1 if tied else len(full))
    stir(model)
    after = logits(model)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(plain), after)
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings == tied
    assert (logits(merged) - after).abs().max() < 0.1


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_16bit"])
def test_layers_trained_in_full_are_float32_on_a_16_bit_model(tiny, tmp_path, conversations, precision, fused_head):
    """An update of 1e-4 would vanish in bfloat16 weights of size 0.1."""
    model, tokenizer = load(tiny(), dtype=torch.bfloat16, **{"load_in_16bit": False, precision: True})
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    (weight,) = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    before = weight.detach().clone()
    assert weight.dtype == torch.float32
    assert logits(model).isfinite().all()  # also without autocast
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-5,
        report_to="none",
        bf16=True,
        use_cpu=True,
        fused_head=fused_head,
    )
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=arguments).train()
    moved = (weight.detach() - before).abs()
    assert 1e-6 < moved.max() < 1e-4
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", dtype=torch.bfloat16)
    assert again.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, SEVEN),
        ({"finetune_mlp_modules": False}, SEVEN[:4]),
        ({"finetune_attention_modules": False}, SEVEN[4:]),
        ({"finetune_mlp_modules": False, "target_modules": ["q_proj", "up_proj"]}, ["q_proj"]),
        ({"finetune_vision_layers": False}, SEVEN),
    ],
)
def test_parts_are_chosen_by_what_they_do(tiny, switches, expected):
    model, _ = FastModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    model = FastModel.get_peft_model(model, r=2, **switches)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == set(expected)


def test_nothing_left_to_train_is_an_error(tiny):
    model, _ = FastModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    with pytest.raises(ConfigError, match="nothing is left"):
        FastModel.get_peft_model(model, finetune_language_layers=False)
    with pytest.raises(AdapterError, match="q_porj"):
        FastModel.get_peft_model(model, finetune_mlp_modules=False, target_modules=["q_porj", "k_proj"])
    with pytest.raises(AdapterError, match="at least one"):
        FastLanguageModel.get_peft_model(model, target_modules=["lm_head"])


def test_all_linear_and_fused_layers(tiny):
    model, _ = load(tiny())
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules="all-linear")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 14
    from transformers import Phi3Config, Phi3ForCausalLM

    from unsloth.models.adapters import _targets

    phi = Phi3ForCausalLM(
        Phi3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    )
    assert _targets(phi, SEVEN) == (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], [])


@pytest.fixture
def from_plain_peft(tiny, tmp_path):
    """An adapter without a tokenizer, as plain PEFT saves it."""
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny()), LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM")
    )
    stir(plain)
    plain.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", logits(plain)


def test_a_folder_of_plain_peft_takes_the_tokenizer_of_its_base(from_plain_peft):
    folder, expected = from_plain_peft
    model, tokenizer = load(folder)
    assert torch.equal(logits(model), expected)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    assert "im_start" in tokenizer.chat_template


def test_a_saved_chat_template_replaces_that_of_the_base(from_plain_peft):
    folder, _ = from_plain_peft
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    _, tokenizer = load(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_the_revision_and_the_fingerprint_are_beside_the_adapter(tiny, tmp_path):
    model, _ = load(tiny())
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter" / "unsloth_base.json").read_text())
    assert content["base"] == str(tiny()) and content["max_seq_length"] == 128
    assert content["identity"]["shapes"]["model.norm.weight"] == [64]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any("embed" in name for name in file.keys())
