"""M03: an adapter loads on the model it was trained on and its quantized twin, and on no other one."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from unsloth import FastLanguageModel
from unsloth.core.errors import AdapterError

LINEAR = "model.layers.0.self_attn.k_proj.weight"


def other(tokenizer, folder, seed=1, **changes):
    """A model like the tiny one, with other weights or another shape."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **changes}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    twin = AutoModelForCausalLM.from_pretrained(tiny(), quantization_config=config, dtype=torch.bfloat16)
    twin.save_pretrained(root / "twin-bnb-4bit")
    tokenizer.save_pretrained(root / "twin-bnb-4bit")
    retrained = shutil.copytree(tiny(), root / "retrained")
    tensors = load_file(retrained / "model.safetensors")
    for name in tensors:
        if "proj" in name:
            tensors[name] = tensors[name] * 1.02
    save_file(tensors, retrained / "model.safetensors", metadata={"format": "pt"})
    return {
        "right": tiny(),
        "twin": root / "twin-bnb-4bit",
        "other weights": other(tokenizer, root / "other"),
        "one layer less": other(tokenizer, root / "less", num_hidden_layers=1),
        "one layer more": other(tokenizer, root / "more", num_hidden_layers=3),
        "other width": other(tokenizer, root / "width", hidden_size=32),
        "other linear layers only": retrained,
    }


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **(options or {"load_in_16bit": True}))


def on(adapter, base, tmp_path):
    """A copy of the adapter that names another base."""
    folder = shutil.copytree(adapter, tmp_path / "copy", dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    model, _ = load(bases["right"])
    folder = tmp_path_factory.mktemp("adapter") / "ours"
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_right_base_loads_in_every_precision(adapter, precision, dtype):
    assert load(adapter, dtype=dtype, **{precision: True})


def test_the_twin_loads_both_ways(adapter, bases, tmp_path):
    assert load(on(adapter, bases["twin"], tmp_path), load_in_4bit=True)
    model, _ = load(bases["twin"], load_in_4bit=True)
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "of twin")
    assert load(on(tmp_path / "of twin", bases["right"], tmp_path), load_in_16bit=True)
    with pytest.raises(AdapterError, match="does not fit"):
        load(on(tmp_path / "of twin", bases["other weights"], tmp_path), load_in_16bit=True)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("other weights", "values of .* are others"),
        ("one layer less", r"it lacks model\.layers\.1"),
        ("one layer more", r"it also has model\.layers\.2"),
        ("other width", "has shape"),
        ("other linear layers only", f"values of {LINEAR} are others"),
    ],
)
def test_another_base_is_refused(adapter, bases, tmp_path, base, reason):
    with pytest.raises(AdapterError, match=rf"does not fit its base.*{reason}.*base_model_name_or_path"):
        load(on(adapter, bases[base], tmp_path))


@pytest.fixture(scope="module")
def from_plain_peft(bases, tmp_path_factory):
    """An adapter without a fingerprint."""
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    model = AutoModelForCausalLM.from_pretrained(bases["right"])
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("right", None),
        ("twin", None),
        ("other weights", None),  # cannot be known
        ("one layer less", r"adapts model\.layers\.1"),
        ("one layer more", r"no weights for model\.layers\.2"),
        ("other width", "takes 32 features where the adapter has 64"),
    ],
)
def test_without_a_fingerprint_the_shapes_decide(from_plain_peft, bases, tmp_path, base, reason):
    folder = on(from_plain_peft, bases[base], tmp_path)
    options = {"load_in_4bit": True} if base == "twin" else {"load_in_16bit": True}
    if reason is None:
        assert load(folder, **options)
        return
    with pytest.raises(AdapterError, match=reason):
        load(folder, **options)
