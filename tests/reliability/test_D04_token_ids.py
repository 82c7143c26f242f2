"""D04: token ids for which the embedding has no row are an error at load; an embedding padded larger is accepted."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unsloth import FastLanguageModel
from unsloth.core.errors import TokenizerError


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True, **options)


@pytest.fixture
def with_more_tokens(tiny, tmp_path):
    """The tiny model with three tokens added to its tokenizer, and not to its embedding."""
    folder = shutil.copytree(tiny(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_added_without_rows_are_an_error(with_more_tokens):
    with pytest.raises(TokenizerError, match="up to 262.*260 rows.*resize_model_vocab=263"):
        load(with_more_tokens)


def test_the_remedy_works(with_more_tokens):
    model, tokenizer = load(with_more_tokens, resize_model_vocab=263)
    ids = tokenizer("x<c>", return_tensors="pt").input_ids
    assert ids.tolist()[0][-1] == 262
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_an_adapter_with_a_larger_tokenizer_is_an_error(tiny, with_more_tokens, tmp_path):
    model, _ = load(tiny())
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(with_more_tokens).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TokenizerError, match="260 rows"):
        load(tmp_path / "adapter")


def test_a_padded_embedding_is_accepted(tiny, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(tiny())
    plain.resize_token_embeddings(320)
    plain.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tiny()).save_pretrained(tmp_path / "padded")
    model, tokenizer = load(tmp_path / "padded")
    assert model.get_input_embeddings().weight.shape[0] == 320 and len(tokenizer) == 260
