"""The calls of the documentation, as they stand there."""

from pathlib import Path

import pytest
import torch

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import ConfigError, UploadError
from unsloth.export import upload


@pytest.fixture
def model(tiny):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_4bit=True
    )
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


@pytest.fixture
def pushed(monkeypatch, tmp_path):
    """What would have been uploaded: (repository, private, files), in a hub that is not asked."""
    calls = []

    def prepare(repo_id, token=None, private=None):
        return upload.Repository(repo_id, f"hub/{repo_id}", api=(token, private is not False))

    def send(folder, repository, message=None):
        assert artifact.verify(folder) == []
        calls.append((repository.name, repository.api, {path.name for path in Path(folder).iterdir()}))
        return repository.url

    monkeypatch.setattr(upload, "prepare", prepare)
    monkeypatch.setattr(upload, "upload", send)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_documented_calls_save_and_push(model, pushed):
    model, tokenizer = model
    model.save_pretrained_merged("model", tokenizer, save_method="merged_16bit")
    model.push_to_hub_merged("hf/model", tokenizer, save_method="merged_16bit", token="")
    with pytest.raises(ConfigError, match="merged_4bit_forced"):
        model.save_pretrained_merged("model", tokenizer, save_method="merged_4bit")
    with pytest.raises(ConfigError, match="merged_4bit_forced"):
        model.push_to_hub_merged("hf/model", tokenizer, save_method="merged_4bit", token="")
    with pytest.raises(ConfigError, match=r"gpt-oss.*merged_16bit"):
        model.push_to_hub_merged("hf/model", tokenizer, save_method="mxfp4", token="")
    model.push_to_hub_merged("hf/model", tokenizer, save_method="lora", token="")
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    assert model.push_to_hub("your_name/lora_model", token="...") == "hub/your_name/lora_model"
    model.save_pretrained("model", safe_serialization=None, maximum_memory_usage=0.5)
    model.save_pretrained("other", push_to_hub=True, repo_id="me/it", private=False)
    names, settings, files = zip(*pushed, strict=True)
    assert names == ("hf/model", "hf/model", "your_name/lora_model", "me/it")
    assert settings == (("", True), ("", True), ("...", True), (None, False))
    assert "model.safetensors" in files[0] and "adapter_model.safetensors" not in files[0]
    assert "adapter_model.safetensors" in files[1] and "model.safetensors" not in files[1]
    assert {"adapter_model.safetensors", "tokenizer.json"} <= files[2]


def test_the_documented_calls_for_gguf(model, pushed, tmp_path):
    model, tokenizer = model
    model.save_pretrained_gguf("directory", tokenizer, quantization_method="f16")
    methods = ["q4_k_m", "q8_0", "q5_k_m"]
    model.push_to_hub_gguf("your-username/model-name", tokenizer, quantization_method=methods, token="your-token")
    ((name, settings, files),) = pushed
    assert name == "your-username/model-name" and settings == ("your-token", True)
    assert sorted(file.rsplit(".", 2)[1] for file in files if file.endswith(".gguf")) == ["Q4_K_M", "Q5_K_M", "Q8_0"]
    assert {"Modelfile", "README.md", "manifest.json"} < files
    model.save_pretrained_gguf("pushed", tokenizer, push_to_hub=True, private=False, verify=False)
    assert pushed[-1][:2] == ("pushed", (None, False))


def test_without_a_network_nothing_is_begun(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE"):
        model[0].push_to_hub_merged("me/model", model[1])
    assert list(tmp_path.iterdir()) == []
