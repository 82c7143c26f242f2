"""Arguments of from_pretrained: what each does, and what is said of those that this version does not have."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError, UnslothError
from unsloth.models import load as loading
from unsloth.models import placement


def load(folder, **options):
    arguments = {"max_seq_length": 64, "load_in_16bit": True, **options}
    return FastLanguageModel.from_pretrained(str(folder), **arguments)


@pytest.mark.parametrize(
    "device_map", ["sequential", "balanced", "auto", "cpu", {"": "cpu"}, torch.device("cpu"), None]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says where a model is without a GPU")
def test_device_maps_without_a_gpu(tiny, device_map):
    model, _ = load(tiny(), device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_device_maps_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert placement.resolved("sequential") == {"": torch.device("cuda", 1)}
    assert placement.resolved("balanced") == "balanced"
    assert placement.resolved("cuda:0") == {"": torch.device("cuda", 0)}
    assert placement.resolved("cpu") == {"": "cpu"}
    assert placement.resolved({"model": 0, "lm_head": 1}) == {"model": 0, "lm_head": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "gpu"}, "balanced"),
        ({"device_map": {}}, "unknown device_map"),
        ({"resize_model_vocab": 0}, "number of tokens"),
        ({"auto_model": "AutoModel"}, "AutoModelForCausalLM"),
        ({"gpu_memory_utilization": 1.5}, "share of the device's memory"),
        ({"qat_scheme": "int4"}, "load_in_4bit=True"),
        ({"max_seq_length": 0}, "positive number"),
        ({"dtype": "int8"}, "torch.bfloat16"),
    ],
)
def test_wrong_values_say_what_to_do(tiny, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(tiny(), **arguments)


def test_another_class_of_transformers(tiny):
    model, _ = load(tiny(), auto_model=AutoModel)
    assert type(model).__name__ == "LlamaModel"
    model, _ = load(tiny(), auto_model=AutoModelForSequenceClassification, num_labels=3)
    assert model.score.out_features == 3  # a new head; anything else that is missing is an error
    found = SimpleNamespace(name="a model")
    with pytest.raises(UnslothError, match=r"tensors are missing.*model\.norm\.weight"):
        loading._check_complete(found, {"missing_keys": {"model.norm.weight", "score.weight"}}, model)


def test_documented_arguments_that_change_nothing(tiny):
    plain, _ = load(tiny())
    model, _ = load(
        tiny(),
        use_exact_model_name=True,
        offload_embedding=True,
        offload_embeddings=True,
        unsloth_force_compile=True,
        gpu_memory_utilization=0.9,
        max_lora_rank=32,
        disable_log_stats=False,
    )
    ids = torch.arange(4, 40)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_length_that_was_not_asked_for_is_the_models_own(tiny):
    model, _ = FastLanguageModel.from_pretrained(str(tiny()), load_in_16bit=True)
    assert model.max_seq_length == 512
    assert model.config.rope_parameters["rope_type"] == "default"
    model, _ = load(tiny(), max_seq_length=2048)
    assert model.max_seq_length == 2048
    assert model.config.rope_parameters["rope_type"] == "yarn"


def test_the_configuration_is_read_without_the_weights(tiny, tmp_path):
    model, _ = load(tiny())
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    for name in (tiny(), tmp_path / "adapter"):
        config = loading.read_config(loading.LoadOptions(str(name), max_seq_length=1024))
        assert config.hidden_size == 64 and config.rope_parameters["factor"] == 2.0
