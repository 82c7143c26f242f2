"""Rows and tokens: added, never taken away; what is saved afterwards loads again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unsloth import FastLanguageModel, add_new_tokens
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.models import vocabulary

ROWS = 260  # of the tiny models, all used


def load(folder, **options):
    arguments = {"dtype": torch.float32, "load_in_16bit": True, **options}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, **arguments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_16bit"])
def test_new_tokens_are_one_token_and_start_at_the_mean(tiny, tied, precision):
    model, tokenizer = load(tiny("llama", tied), **{"load_in_16bit": False, precision: True})
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    add_new_tokens(model, tokenizer, new_tokens=["<think>", " naïve word", "<think>"])
    (first,), (second,) = (tokenizer.encode(t, add_special_tokens=False) for t in ("<think>", " naïve word"))
    assert (first, second) == (ROWS, ROWS + 1)
    assert tokenizer.decode([second]) == " naïve word"
    assert len(tokenizer.encode("a<think>b", add_special_tokens=False)) == 3
    after = model.get_input_embeddings().weight
    assert after.shape[0] == 320 == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert torch.equal(after[:ROWS], before)
    assert torch.allclose(after[ROWS:], before.mean(0).expand(60, -1), atol=1e-6)
    assert torch.allclose(model.get_output_embeddings().weight[first], head.mean(0), atol=1e-6)
    assert (model.get_output_embeddings().weight is after) == tied


def test_interpolation_starts_between_the_mean_and_the_pieces(tiny):
    model, tokenizer = load(tiny())
    before = model.get_input_embeddings().weight.detach().clone()
    pieces = tokenizer.encode("<x>", add_special_tokens=False)
    add_new_tokens(model, tokenizer, ["<x>"], method="interpolation", interpolation=0.25)
    expected = 0.75 * before.mean(0) + 0.25 * before[pieces].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[ROWS], expected, atol=1e-6)


def test_spare_rows_are_used_and_nothing_shrinks(tiny):
    model, tokenizer = load(tiny(), resize_model_vocab=300)
    assert vocabulary.rows(model) == 300
    add_new_tokens(model, tokenizer, ["<a>", "<b>"])
    assert vocabulary.rows(model) == 300
    model, tokenizer = load(tiny(), resize_model_vocab=100)
    assert vocabulary.rows(model) == ROWS
    add_new_tokens(model, tokenizer, [tokenizer.eos_token])
    assert vocabulary.rows(model) == ROWS == len(tokenizer)


@pytest.mark.parametrize("trained", [[], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_with_new_tokens_loads_again(tiny, tmp_path, trained, tied):
    model, tokenizer = load(tiny("llama", tied))
    add_new_tokens(model, tokenizer, ["<think>", "</think>"])
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", *trained])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    ids = tokenizer("<think>four</think>", return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, same_tokenizer = load(tmp_path / "adapter")
    assert same_tokenizer.encode("<think>", add_special_tokens=False) == [ROWS]
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, expected)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<think>").input_ids == [ROWS]
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - expected).abs().max() < 0.1


def test_rows_set_anew_survive_being_saved_twice(tiny, tmp_path):
    """Spare rows were used, so that the embedding has the size of the base's, but not its values."""
    base = AutoModelForCausalLM.from_pretrained(tiny())
    base.resize_token_embeddings(320)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny()).save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    add_new_tokens(model, tokenizer, ["<think>"])
    row = model.get_input_embeddings().weight[ROWS].detach().clone()
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "first")
    load(tmp_path / "first")[0].save_pretrained(tmp_path / "second")
    again, _ = load(tmp_path / "second")
    assert torch.equal(again.get_input_embeddings().weight[ROWS], row)


def test_wrong_uses_are_refused(tiny):
    model, tokenizer = load(tiny())
    for wrong in ("<think>", ["a", ""], [3]):
        with pytest.raises(ConfigError, match="list of texts"):
            add_new_tokens(model, tokenizer, wrong)
    with pytest.raises(ConfigError, match="mean, interpolation"):
        add_new_tokens(model, tokenizer, ["<a>"], method="median")
    with pytest.raises(ConfigError, match="from 0 to 1"):
        add_new_tokens(model, tokenizer, ["<a>"], method="interpolation", interpolation=2)
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    with pytest.raises(AdapterError, match="before get_peft_model"):
        add_new_tokens(adapted, tokenizer, ["<a>"])
    assert len(tokenizer) == ROWS
