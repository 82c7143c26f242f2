"""Checkpoints whose weights are quantized already: bitsandbytes (kept as they are) and FP8 (dequantized)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core.errors import CheckpointError, ConfigError
from unsloth.models.plan import suspended
from unsloth.quant import fp8, nf4

IDS = torch.arange(4, 60)[None]
BLOCK = (48, 40)  # covers no side of a layer exactly


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def mixed(tiny, tokenizer, tmp_path_factory):
    """A 4-bit checkpoint made by plain transformers, some of whose layers stay in 16 bits."""
    folder = tmp_path_factory.mktemp("models") / "tiny-unsloth-bnb-4bit"
    skip = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny(), quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_mixed_layers_load_as_they_are_and_train(mixed, tmp_path, conversations):
    model, tokenizer = load(mixed, load_in_4bit=True, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj) is torch.nn.Linear
    assert type(layer.mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    plain = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.bfloat16)
    nf4.keep_layout(plain)  # else it rounds the scales to bfloat16 on a processor with AVX512-BF16
    with torch.no_grad(), suspended(model):  # whose norms round once, not twice
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    model = FastLanguageModel.get_peft_model(model, r=4)
    arguments = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to="none", learning_rate=1e-2)
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=arguments).train()
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and all(p.abs().max() > 0 for p in moved)


def test_the_computation_is_in_the_dtype_asked_for(mixed):
    model, _ = load(mixed, dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float32


def test_quantized_weights_are_not_loaded_as_16_bit_ones(mixed):
    for asked in ({"load_in_4bit": False}, {"load_in_16bit": True}, {"full_finetuning": True}):
        with pytest.raises(ConfigError, match=r"tiny'\), or pass load_in_4bit=True"):
            load(mixed, **asked)


def test_another_format_is_refused(mixed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in mixed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq.*original model"):
        load(folder)


def make_fp8(tiny_folder, folder, block=BLOCK, scale_dtype=torch.float32):
    """Write the model in FP8, as DeepSeek and Qwen (a scale a block) or Mistral (one scale) do."""
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors, dequantized = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        dequantized[name] = tensor
        if name.endswith("proj.weight"):
            weight, scale = fp8.quantize(tensor, block or tuple(tensor.shape))
            scale = (scale if block else scale.squeeze()).to(scale_dtype)
            tensors[name], tensors[f"{name}_scale_inv"] = weight, scale
            dequantized[name] = fp8.dequantize(weight, scale, block)
            if not block:
                tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": block,
        "activation_scheme": "dynamic" if block else "static",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dequantized


@pytest.mark.parametrize(("block", "scale_dtype"), [(BLOCK, torch.float32), (None, torch.bfloat16)])
def test_fp8_becomes_a_16_bit_base(tiny, tmp_path, block, scale_dtype):
    dequantized = make_fp8(tiny(), tmp_path / "fp8", block, scale_dtype)
    model, _ = load(tmp_path / "fp8", load_in_16bit=True)
    plain = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    with torch.no_grad():
        original = plain(input_ids=IDS).logits
        plain.load_state_dict(dequantized, strict=False)
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert not torch.equal(model(input_ids=IDS).logits, original)
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers keeps FP8 weights on a GPU")
def test_fp8_equals_what_transformers_makes_of_it(tiny, tmp_path):
    """It reads scales of whole blocks only, and dequantizes where there is no GPU."""
    make_fp8(tiny(), tmp_path / "fp8", (16, 32))
    model, _ = load(tmp_path / "fp8", load_in_16bit=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5)


def test_fp8_is_quantized_anew_to_nf4_and_saves_as_an_ordinary_model(tiny, tmp_path):
    dequantized = make_fp8(tiny(), tmp_path / "fp8")
    model, tokenizer = load(tmp_path / "fp8", load_in_4bit=True)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    plain = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    plain.load_state_dict(dequantized, strict=False)
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    reference, _ = load(tmp_path / "plain", load_in_4bit=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_an_fp8_weight_without_its_scale_is_named(tiny, tmp_path):
    make_fp8(tiny(), tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*no scale"):
        load(tmp_path / "fp8")
