"""The methods of a loaded model: fast_generate, adapters, and a generate that goes through the engine."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import TextIteratorStreamer

from unsloth import FastLanguageModel, SamplingParams
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.generate import model_methods

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def loaded(tiny):
    """A tiny model in 16 bits (float32 here) with an adapter that matters, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny("qwen3")), max_seq_length=128, load_in_16bit=True, dtype=torch.float32, fast_inference=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model, tokenizer


def plain(model, prompt, tokenizer, **kwargs):
    ids = tokenizer(prompt, return_tensors="pt")
    return type(model).generate(model, **ids, max_new_tokens=8, do_sample=False, **kwargs)[0]


def test_fast_generate(loaded):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    prompts = ["Hello!", "What is 2 + 2?"]
    outputs = model.fast_generate(prompts, sampling_params=GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = plain(model, prompt, tokenizer)[len(tokenizer(prompt)["input_ids"]) :]
        assert output.outputs[0].token_ids == expected.tolist()
        assert output.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert output.prompt == prompt
    ids = tokenizer(prompts[0])["input_ids"]
    assert model.fast_generate(ids, GREEDY)[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert model.fast_generate(chat, GREEDY)[0].prompt_token_ids == rendered
    assert [o.prompt_token_ids for o in model.fast_generate([chat, ids], GREEDY)] == [rendered, ids]
    again = model.fast_generate({"prompt": prompts[0]}, GREEDY)[0]
    assert again.outputs[0].text == outputs[0].outputs[0].text
    with pytest.raises(ConfigError, match="no such argument"):
        model.fast_generate(prompts, sampling_parameters=GREEDY)


def test_eight_bit_weights(tiny):
    """LLM.int8(), where outliers are found over all rows of a product: one prompt at a time."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny("qwen3")), max_seq_length=128, load_in_8bit=True, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    FastLanguageModel.for_inference(model)
    for prompt in ("Hello!", "What is 2 + 2?"):
        expected = plain(model, prompt, tokenizer)[len(tokenizer(prompt)["input_ids"]) :]
        assert model.fast_generate(prompt, GREEDY)[0].outputs[0].token_ids == expected.tolist()
    together = model.fast_generate(["Hello!", "What is 2 + 2?", "Hi"], GREEDY)
    assert all(output.outputs[0].token_ids for output in together)


def test_adapters_by_name(loaded, tmp_path):
    model, tokenizer = loaded
    live = model.fast_generate("Hello!", GREEDY)[0].outputs[0].token_ids
    base = model.fast_generate("Hello!", GREEDY, lora_request=False)[0].outputs[0].token_ids
    model.save_lora(tmp_path / "first")
    request = model.load_lora(tmp_path / "first")
    weights = [p for n, p in model.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        torch._foreach_mul_(weights, -2.0)
    changed = model.fast_generate("Hello!", GREEDY)[0].outputs[0].token_ids
    assert model.fast_generate("Hello!", GREEDY, lora_request=request)[0].outputs[0].token_ids == live
    mixed = model.fast_generate(["Hello!"] * 3, GREEDY, lora_request=[None, "first", False])
    assert [output.outputs[0].token_ids for output in mixed] == [changed, live, base]
    assert len({tuple(changed), tuple(live), tuple(base)}) == 3
    model.save_lora(tmp_path / "default")
    assert model.load_lora(tmp_path / "default").lora_name == "default-2"  # the model's own has that name
    with torch.no_grad():
        torch._foreach_mul_(weights, -0.5)


def test_adapters_that_do_not_fit(loaded, tmp_path, tiny):
    model, _ = loaded
    with pytest.raises(AdapterError, match="no such adapter folder"):
        model.load_lora(tmp_path / "nothing")
    other, _ = FastLanguageModel.from_pretrained(str(tiny("qwen3")), load_in_16bit=True)
    full = FastLanguageModel.get_peft_model(other, r=2, target_modules=["q_proj", "lm_head"])
    full.save_lora(tmp_path / "full")
    with pytest.raises(AdapterError, match="more than LoRA matrices"):
        model.load_lora(tmp_path / "full")
    with pytest.raises(AdapterError, match="no adapter to save"):
        FastLanguageModel.from_pretrained(str(tiny("qwen3")), load_in_16bit=True)[0].save_lora(tmp_path / "x")


def test_generate_goes_through_the_engine_and_gives_what_transformers_gives(loaded):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    tokenizer.padding_side = "left"
    batch = tokenizer(["Hello!", "A longer prompt, padded.", "x"], return_tensors="pt", padding=True)
    methods = model_methods.find(model)
    before = methods.engine().stats().finished
    for kwargs in (
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "repetition_penalty": 1.4},
        {"max_new_tokens": 9, "min_new_tokens": 4, "eos_token_id": list(range(40, 90))},
        {"max_length": 40},
    ):
        expected = type(model).generate(model, **batch, do_sample=False, **kwargs)
        assert torch.equal(model.generate(**batch, do_sample=False, **kwargs), expected), kwargs
    assert methods.engine().stats().finished == before + 12
    torch.manual_seed(0)
    drawn = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=5, temperature=1.2)
    assert drawn.shape == (6, batch["input_ids"].shape[1] + 5)
    torch.manual_seed(0)
    assert torch.equal(
        drawn, model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=5, temperature=1.2)
    )


def test_streamers_and_inference_mode(loaded):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokenizer("Hello!", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    model.fast_generate("Hello!", GREEDY)  # outside inference mode, on the same engine


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"num_beams": 2}, "the setting num_beams"),
        ({"no_repeat_ngram_size": 2}, "the setting no_repeat_ngram_size"),
        ({"return_dict_in_generate": True}, "the setting return_dict_in_generate"),
        ({"use_cache": False}, "use_cache=False"),
        ({"logits_processor": [lambda ids, scores: scores]}, "the argument logits_processor"),
        ({"input_ids": torch.full((1, 126), 50), "attention_mask": torch.ones(1, 126)}, "more than 128 tokens"),
    ],
)
def test_what_the_engine_does_not_know_is_left_to_transformers_and_said_once(loaded, caplog, kwargs, reason):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    ids = tokenizer("Hello!", return_tensors="pt")
    given = {**ids, "max_new_tokens": 4, "do_sample": False, **kwargs}
    logging.getLogger("unsloth").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "unsloth"):
            for _ in range(2):
                model.generate(**given)
    finally:
        logging.getLogger("unsloth").removeHandler(caplog.handler)
    assert len({id(record) for record in caplog.records if reason in record.getMessage()}) == 1


def test_training_takes_the_models_own_generate_back_and_frees_the_cache(loaded):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    model.fast_generate("Hello!", GREEDY)
    engine = model_methods.find(model).engine()
    assert engine.stats().cache_bytes > 0
    FastLanguageModel.for_training(model)
    assert engine.stats().cache_bytes == 0 and "generate" not in model.__dict__ and model.training
    rows = tokenizer("Hello!", return_tensors="pt")["input_ids"]
    model(input_ids=rows, labels=rows).loss.backward()
    FastLanguageModel.for_inference(model)
    assert model.fast_generate("Hello!", GREEDY)[0].finished


def test_a_copy_has_an_engine_of_its_own(loaded):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    expected = model.fast_generate("Hello!", GREEDY)[0].outputs[0].token_ids
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).mul_(-3)
    assert model_methods.find(other).model is other
    got = other.fast_generate("Hello!", GREEDY)[0].outputs[0].token_ids
    assert got == plain(other, "Hello!", tokenizer)[6:].tolist()
    assert pickle.loads(pickle.dumps(model_methods.find(model).options)) == model_methods.find(model).options
    assert model.fast_generate("Hello!", GREEDY)[0].outputs[0].token_ids == expected


def test_a_switch_leaves_generate_to_transformers(loaded, monkeypatch):
    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    monkeypatch.setenv("UNSLOTH_DISABLE_FAST_GENERATION", "1")
    before = model_methods.find(model).engine().stats().requests
    model.generate(**tokenizer("Hello!", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert model_methods.find(model).engine().stats().requests == before
