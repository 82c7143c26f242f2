"""An embedding in host memory looks up the same rows, stays where it is, and is refused where it would be wrong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth.core.errors import ModelError
from unsloth.layers import host_embedding
from unsloth.layers.host_embedding import HostEmbedding


def build(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def test_same_logits_same_state_and_not_the_first_parameter():
    model = build()
    ids = torch.tensor([[0, 3, 39], [7, 7, 1]])
    expected, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    assert host_embedding.move(model) is None
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(model(ids).logits, expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()) is not model.get_input_embeddings().weight
    assert next(model.model.parameters()) is not model.get_input_embeddings().weight


def test_it_stays_when_the_model_is_cast_or_moved():
    model = build()
    host_embedding.move(model)
    model.to(torch.bfloat16).to("meta")
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert model.lm_head.weight.device.type == "meta"


def test_copies_look_up_the_same():
    embedding = HostEmbedding(torch.nn.Embedding(10, 4).requires_grad_(False))
    ids = torch.arange(10)
    for twin in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(twin(ids), embedding(ids)) and twin.weight.data_ptr() != embedding.weight.data_ptr()


@pytest.mark.parametrize(
    ("tied", "trained", "reason"), [(True, False, "output head as well"), (False, True, "it is trained")]
)
def test_what_the_gpu_needs_stays(tied, trained, reason):
    model = build(tied).requires_grad_(trained)
    before = model.get_input_embeddings()
    assert reason in host_embedding.move(model)
    assert model.get_input_embeddings() is before


def test_training_it_is_refused():
    embedding = HostEmbedding(torch.nn.Embedding(10, 4).requires_grad_(False))
    embedding.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="cannot be trained"):
        embedding(torch.arange(3))
