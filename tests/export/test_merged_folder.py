import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core import artifact
from unsloth.core.errors import AdapterError, ConfigError, ExportError
from unsloth.export import card, merge, verify


def adapted(folder, precision="load_in_16bit", **options):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=512, dtype=torch.float32, **{precision: True}
    )
    if precision != "full_finetuning":
        model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, tokenizer


def read(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_the_proof_is_kept_and_the_model_goes_on_training(tiny, tmp_path):
    model, tokenizer = adapted(tiny(), lora_dropout=0.5)
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    comparison = model.save_pretrained_merged(tmp_path / "m", tokenizer)
    report = json.loads((tmp_path / "m" / "unsloth_export.json").read_text())
    assert report["layers_checked"] == 14 and report["reloaded"] == "whole"
    assert report["comparison"]["top1_agreement"] == comparison.top1_agreement
    assert report["base"] == tiny().name  # not the folder it lies in
    text = (tmp_path / "m" / card.NAME).read_text()
    assert f"{comparison.median_kl:.1e}" in text and "r = 4" in text and str(tiny().parent) not in text
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert artifact.verify(tmp_path / "m") == []


def test_without_room_for_a_copy_its_layers_are_read_one_after_another(tiny, tmp_path, monkeypatch):
    model, tokenizer = adapted(tiny("llama", tied=False))
    places = []
    load = type(model.get_base_model()).from_pretrained.__func__

    def watched(cls, *args, **options):
        loaded, info = load(cls, *args, **options)
        places.append({parameter.device.type for parameter in loaded.parameters()})
        return loaded, info

    monkeypatch.setattr(type(model.get_base_model()), "from_pretrained", classmethod(watched))
    whole = model.save_pretrained_merged(tmp_path / "a", tokenizer)
    monkeypatch.setattr(verify.device, "free_memory", lambda _: 200_000)  # bytes; the model takes 250 kB
    streamed = model.save_pretrained_merged(tmp_path / "b", tokenizer)
    assert places == [{"cpu"}, {"meta"}]
    assert streamed == whole
    assert json.loads((tmp_path / "b" / "unsloth_export.json").read_text())["reloaded"] == "layer by layer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_small_shard_size_makes_many_files_of_the_same_model(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    model.save_pretrained_merged(tmp_path / "one", tokenizer)
    model.save_pretrained_merged(tmp_path / "many", tokenizer, max_shard_size="40KB")
    files = list((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 45_000 for path in files)
    first, second = read(tmp_path / "one"), read(tmp_path / "many")
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_four_bits_only_when_forced(tiny, tmp_path):
    model, tokenizer = adapted(tiny("llama", tied=False), "load_in_4bit")
    with pytest.raises(ConfigError, match="merged_4bit_forced"):
        model.save_pretrained_merged(tmp_path / "m", tokenizer, save_method="merged_4bit")
    comparison = model.save_pretrained_merged(tmp_path / "m", tokenizer, save_method="merged_4bit_forced")
    assert comparison.median_kl < 0.5
    tensors = read(tmp_path / "m")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "m"), max_seq_length=64, dtype=torch.float32)
    up = again.model.layers[1].mlp.up_proj
    merged = dict(merge.merged_tensors(model))["model.layers.1.mlp.up_proj.weight"].float()
    values = dict(merge.merged_tensors(again, torch.float32))["model.layers.1.mlp.up_proj.weight"]
    assert type(up.weight).__name__ == "Params4bit"
    assert torch.nn.functional.cosine_similarity(values.flatten(), merged.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("options", [{"adapter_scale": 0.5}, {"base_weight": 0.5}, {"adapters": {"default": 0.5}}])
def test_a_weaker_adapter_is_compared_with_the_model_that_computes_it(tiny, tmp_path, options):
    model, tokenizer = adapted(tiny())
    scaling = [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    comparison = model.save_pretrained_merged(tmp_path / "m", tokenizer, **options)
    assert comparison.median_kl < 1e-3
    half = load_file(tmp_path / "m" / "model.safetensors")
    model.save_pretrained_merged(tmp_path / "whole", tokenizer)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert not torch.equal(half["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"])
    assert scaling == [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_average_that_the_model_cannot_compute_is_still_written(tiny, tmp_path, kind):
    model, tokenizer = adapted(tiny("llama", tied=False), **kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    comparison = model.save_pretrained_merged(tmp_path / "m", tokenizer, base_weight=0.9)
    assert comparison.median_kl > 1e-3


def test_a_layer_that_is_scaled_wrongly_is_found(tiny, tmp_path, monkeypatch):
    model, tokenizer = adapted(tiny(), use_dora=True)
    monkeypatch.setattr(verify, "factors", lambda layer, options: {"default": 0.6})
    with pytest.raises(ExportError, match=r"layers\.0.*differs from its layer"):
        model.save_pretrained_merged(tmp_path / "m", tokenizer, adapter_scale=0.5)
    assert list(tmp_path.iterdir()) == []


def test_full_fine_tunes_and_models_without_an_adapter(tiny, tmp_path):
    model, tokenizer = adapted(tiny(), "full_finetuning")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained_merged(tmp_path / "m", tokenizer)
    trained = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(trained, model.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16))
    with pytest.raises(AdapterError, match="no adapter"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="lora")


def test_what_makes_no_sense_is_refused_before_anything_is_written(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    wrong = [
        {"max_shard_size": "much"},
        {"maximum_memory_usage": 0},
        {"adapter_scale": float("inf")},
        {"save_method": "lora", "adapter_scale": 0.5},
        {"adapters": []},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            model.save_pretrained_merged(tmp_path / "m", tokenizer, **options)
    with pytest.raises(AdapterError):
        model.save_pretrained_merged(tmp_path / "m", tokenizer, adapters="other")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_is_saved_with_tokenizer_and_card_in_one_folder(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    model.save_pretrained_merged(tmp_path / "a", tokenizer, save_method="lora")
    assert artifact.verify(tmp_path / "a") == []
    listed = {record.name for record in artifact.read_manifest(tmp_path / "a")["files"]}
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= listed
    assert "library_name: peft" in (tmp_path / "a" / "README.md").read_text()


def test_an_adapter_is_not_mixed_with_a_merged_model(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    model.save_pretrained_merged(tmp_path / "m", tokenizer)
    model.save_pretrained_merged(tmp_path / "m", tokenizer, save_method="lora")
    assert not (tmp_path / "m" / "model.safetensors").exists() and (tmp_path / "m" / "tokenizer.json").exists()
    (tmp_path / "m" / "notes.txt").write_text("kept")
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "kept"


def test_the_card_tells_how_the_model_was_trained(tiny, tmp_path):
    model, tokenizer = adapted(tiny())
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        optim="adamw_torch",
        report_to="none",
    )
    rows = [{"text": f"one and {number}"} for number in range(12)]
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=config)
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / card.NAME).read_text()
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert "SFTTrainer, 3 steps of 4 rows, 1.0 epochs on 12 rows" in text
    assert "adamw_torch, learning rate 0.0003" in text and f"{last:.3f} (step 3)" in text
