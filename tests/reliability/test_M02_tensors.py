"""M02: a missing tensor, a wrong dtype or shape, values that are not finite: hard errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError

LAYER = "model.layers.1.mlp.up_proj.weight"
PRECISIONS = ["load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"]


@pytest.fixture
def edited(tiny, tmp_path):
    """``edited(change)``: the tiny model after ``change(tensors)``."""

    def make(change):
        folder = shutil.copytree(tiny(), tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def load(folder, precision="load_in_16bit"):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **{precision: True})


@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_16bit"])
def test_a_missing_tensor(edited, precision):
    folder = edited(lambda tensors: tensors.pop(LAYER))
    with pytest.raises(CheckpointError, match=f"1 tensors are missing.*{LAYER}"):
        load(folder, precision)


def test_a_missing_tensor_may_be_allowed(edited, monkeypatch):
    monkeypatch.setenv("UNSLOTH_WARN_UNINITIALIZED", "0")
    assert load(edited(lambda tensors: tensors.pop(LAYER)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_wrong_dtype(edited, dtype):
    folder = edited(lambda tensors: tensors.update({LAYER: tensors[LAYER].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{LAYER}.*values"):
        load(folder)


@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_16bit"])
@pytest.mark.parametrize("name", [LAYER, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_wrong_shape(edited, precision, name):
    folder = edited(lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match="another shape"):
        load(folder, precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_that_are_not_finite(edited, precision, value):
    def change(tensors):
        tensors[LAYER][3, 5] = value

    with pytest.raises(CheckpointError, match=f"not finite.*{LAYER}"):
        load(edited(change), precision)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_never_quantized(edited, name):
    def change(tensors):
        tensors[name].view(-1)[-1] = float("nan")

    with pytest.raises(CheckpointError, match=f"not finite.*{name}"):
        load(edited(change), "load_in_4bit")


def test_scales_of_a_quantized_checkpoint(tiny, tokenizer, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny(), quantization_config=config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path, "load_in_4bit")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.absmax"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"not finite.*{LAYER}"):
        load(tmp_path, "load_in_4bit")


def test_a_configuration_that_is_not_of_this_model(tiny, tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for wrong in (config | {"hidden_size": 32}, config | {"num_hidden_layers": 3}, config | {"model_type": "lama"}, 3):
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(Exception) as caught:
            load(folder)
        assert type(caught.value).__module__ == "unsloth.core.errors", caught.value
