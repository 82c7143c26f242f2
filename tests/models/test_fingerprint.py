import dataclasses

import pytest
import torch

from unsloth import FastLanguageModel
from unsloth.models import fingerprint


def load(folder, dtype=torch.float32, **precision):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, dtype=dtype, **precision)[0]


def test_the_same_base_in_other_precisions_is_the_same(tiny):
    whole = fingerprint.of(load(tiny(), load_in_16bit=True))
    for found in (
        fingerprint.of(load(tiny(), load_in_4bit=True)),
        fingerprint.of(load(tiny(), load_in_8bit=True)),
        fingerprint.of(load(tiny(), torch.bfloat16, load_in_16bit=True)),
        fingerprint.of(load(tiny(), torch.float16, load_in_16bit=True)),
    ):
        assert whole.difference(found) is None


@pytest.mark.parametrize("precision", [{"load_in_16bit": True}, {"load_in_4bit": True}])
def test_an_adapter_does_not_change_it_and_another_base_does(tiny, precision):
    model = load(tiny(), **precision)
    before = fingerprint.of(model)
    adapted = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    assert before.difference(fingerprint.of(adapted)) is None
    assert fingerprint.Fingerprint(**dataclasses.asdict(before)) == before
    norm = adapted.get_base_model().model.layers[1].input_layernorm.weight
    norm.data *= 1.1
    assert "embeddings or norms" in before.difference(fingerprint.of(adapted))
    norm.data /= 1.1
    adapted.get_base_model().model.layers[1].mlp.up_proj.weight.data[0] += 1
    assert "linear layers" in before.difference(fingerprint.of(adapted))


def test_other_shapes_differ(tiny):
    found = [fingerprint.of(load(tiny(family), load_in_16bit=True)) for family in ("llama", "qwen3")]
    assert "names or shapes" in found[0].difference(found[1])
