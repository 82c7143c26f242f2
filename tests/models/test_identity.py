import dataclasses
import json

import pytest
import torch
import transformers

from unsloth import FastLanguageModel
from unsloth.models import identity


def load(folder, dtype=torch.float32, **precision):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, dtype=dtype, **precision)[0]


def test_the_same_base_in_other_precisions_is_the_same(tiny):
    whole = identity.take(load(tiny(), load_in_16bit=True))
    for found in (
        identity.take(load(tiny(), load_in_4bit=True)),
        identity.take(load(tiny(), load_in_8bit=True)),
        identity.take(load(tiny(), torch.bfloat16, load_in_16bit=True)),
        identity.take(load(tiny(), torch.float16, load_in_16bit=True)),
    ):
        assert identity.difference(whole, found, same_machine=True) is None
        assert identity.difference(found, whole, same_machine=True) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", [{"load_in_16bit": True}, {"load_in_4bit": True}])
def test_an_adapter_does_not_change_it_and_another_base_does(tiny, precision, tied):
    model = load(tiny("llama", tied), **precision)
    before = identity.take(model)
    adapted = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    assert identity.take(adapted) == before
    assert identity.Identity.from_json(json.loads(json.dumps(dataclasses.asdict(before)))) == before

    def differs():
        return identity.difference(before, identity.take(adapted), same_machine=True)

    layer = adapted.get_base_model().model.layers[1]
    layer.input_layernorm.weight.data *= 1.1
    assert differs() == "the values of model.layers.1.input_layernorm.weight are others"
    layer.input_layernorm.weight.data /= 1.1
    assert differs() is None
    layer.mlp.up_proj.weight.data[0] += 1  # neither of the two that are sampled
    assert differs() == "its linear layers have other weights"
    elsewhere = identity.difference(before, identity.take(adapted))
    assert elsewhere == (None if "load_in_4bit" in precision else differs())


def test_what_is_trained_is_left_out_on_demand(tiny):
    model = load(tiny(), full_finetuning=True)
    before = identity.take(model, frozen_only=True)
    assert before.exact == before.linear == {} and before.checksum == ""
    whole = identity.take(model)
    assert identity.difference(whole, before) is None
    for parameter in model.parameters():
        parameter.data += 1
    assert identity.difference(before, identity.take(model, frozen_only=True)) is None
    assert identity.difference(whole, identity.take(model)) is not None


def test_weights_that_are_not_in_memory_are_not_compared(tiny):
    model = load(tiny(), load_in_16bit=True)
    before = identity.take(model)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    found = identity.take(empty)
    assert found.exact == found.linear == {}
    assert identity.difference(before, found) is None


def test_other_shapes_differ(tiny):
    found = [identity.take(load(tiny(family), load_in_16bit=True)) for family in ("llama", "qwen3")]
    assert identity.difference(*found) == "it also has model.layers.0.self_attn.k_norm.weight"
