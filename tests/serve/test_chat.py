"""Chats and completions through OpenAI's own client, compared with transformers on the same model."""

import concurrent.futures
import json
import math
import threading

import httpx
import openai
import pytest
import torch
from tests.serve.conftest import KEY, start, wait_until

from unsloth.data import tool_calls
from unsloth.serve.chat_prompt import ChatPrompt
from unsloth.serve.requests import ChatRequest

MESSAGES = [{"role": "user", "content": "Say well"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def plain(running, ids, new):
    tensor = torch.tensor([ids])
    out = running.model.generate(tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False)
    return out[0, len(ids) :].tolist()


def rendered(running):
    return running.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)


def text_of(running, ids):
    return running.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_chat_is_answered_as_transformers_does(running):
    answer = running.client().chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    prompt = rendered(running)
    expected = plain(running, prompt, 12)
    assert answer.choices[0].message.content == text_of(running, expected)
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(expected)
    assert answer.choices[0].finish_reason == ("stop" if expected[-1] in eos(running) else "length")


def eos(running):
    found = running.model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found, running.tokenizer.eos_token_id]


def test_a_stream_says_the_same_as_the_whole(running):
    ask = {"model": "tiny", "messages": MESSAGES, "temperature": 1.0, "seed": 5, "max_tokens": 20, "n": 2}
    whole = running.client().chat.completions.create(**ask)
    chunks = list(running.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(c.delta.content or "" for c in choices) == whole.choices[index].message.content
        assert [c.finish_reason for c in choices if c.finish_reason] == [whole.choices[index].finish_reason]
        assert choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 5


def test_log_probabilities_are_those_of_the_model(running):
    ask = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 5, "logprobs": True}
    answer = running.client().chat.completions.create(**ask, top_logprobs=3)
    prompt = rendered(running)
    expected = plain(running, prompt, 5)
    logits = running.model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == len(expected)
    for entry, row, token in zip(entries, logits, expected, strict=True):
        assert math.isclose(entry.logprob, row[token].item(), abs_tol=1e-4)
        top = [item.logprob for item in entry.top_logprobs]
        assert torch.allclose(torch.tensor(top), row.topk(3).values, atol=1e-4)
    streamed = running.client().chat.completions.create(**ask, stream=True)
    again = [e.logprob for c in streamed for ch in c.choices if ch.logprobs for e in ch.logprobs.content]
    assert again == pytest.approx([entry.logprob for entry in entries], abs=1e-5)


def test_completions_of_several_prompts_are_in_their_order(running):
    client = running.client()
    prompts = ["abc", "The sun", "x"]
    ask = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(**ask)
    expected = [text_of(running, plain(running, running.tokenizer(p)["input_ids"], 8)) for p in prompts]
    assert [choice.text for choice in answer.choices] == expected
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected
    ids = running.tokenizer("abc")["input_ids"]
    assert client.completions.create(**{**ask, "prompt": ids}).choices[0].text == expected[0]
    assert [c.text for c in client.completions.create(**{**ask, "prompt": [ids, ids]}).choices] == expected[:1] * 2


def test_log_probabilities_of_completions(running):
    answer = running.client().completions.create(model="tiny", prompt="abc", temperature=0, max_tokens=4, logprobs=2)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == answer.usage.completion_tokens
    assert found.token_logprobs == pytest.approx([max(top.values()) for top in found.top_logprobs], abs=1e-5)


def test_a_stop_text_ends_an_answer(running):
    client = running.client()
    ask = {"model": "tiny", "prompt": "The sun", "temperature": 0, "max_tokens": 20}
    text = client.completions.create(**ask).choices[0].text
    stop = text[3:5]
    stopped = client.completions.create(**ask, stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stop=stop, stream=True))
    assert streamed == stopped.text


def test_adapters_come_and_go(running):
    client = running.client()
    post = client.post
    ask = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    base = client.chat.completions.create(model="tiny", **ask).choices[0].message.content
    post("/load_lora_adapter", cast_to=object, body={"lora_name": "mine", "lora_path": "first"})
    assert [model.id for model in client.models.list()] == ["tiny", "mine"]
    assert client.models.retrieve("mine").id == "mine"
    first = client.chat.completions.create(model="mine", **ask).choices[0].message.content
    assert first != base
    post("/load_lora_adapter", cast_to=object, body={"lora_name": "mine", "lora_path": "second"})
    assert client.chat.completions.create(model="mine", **ask).choices[0].message.content not in (first, base)
    assert client.chat.completions.create(model="tiny", **ask).choices[0].message.content == base
    post("/unload_lora_adapter", cast_to=object, body={"lora_name": "mine"})
    with pytest.raises(openai.NotFoundError, match=r"no model 'mine' here. There are: tiny\."):
        client.chat.completions.create(model="mine", **ask)
    with pytest.raises(openai.NotFoundError, match="no adapter 'mine'"):
        post("/unload_lora_adapter", cast_to=object, body={"lora_name": "mine"})


def test_an_adapter_that_does_not_fit_is_refused_and_the_engine_goes_on(running):
    client = running.client()
    with pytest.raises(openai.BadRequestError):
        client.post("/load_lora_adapter", cast_to=object, body={"lora_name": "wrong", "lora_path": "wrong"})
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_tools_reach_the_template_and_calls_come_back(running, monkeypatch):
    seen = {}

    def split(text):
        seen["text"] = text
        return "", [tool_calls.ToolCall("call_1", "weather", '{"city": "Oslo"}')]

    monkeypatch.setattr(tool_calls, "split", split)
    template = "{{ tools | tojson }}{% for m in messages %}{{ m['role'] }}{{ m.get('tool_calls') }}{% endfor %}"
    monkeypatch.setattr(running.engine.tokenizer, "chat_template", template)
    called = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [called]}]
    request = ChatRequest(model="tiny", messages=messages, tools=TOOLS)
    text = running.tokenizer.decode(ChatPrompt(running.engine.tokenizer).tokens(request))
    assert json.dumps(SCHEMA) in text and "'arguments': {'city': 'Rome'}" in text
    ask = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    answer = running.client().chat.completions.create(**ask).choices[0]
    assert answer.message.tool_calls[0].function.name == "weather" and answer.message.content is None
    deltas = [c.choices[0].delta for c in running.client().chat.completions.create(**ask, stream=True)]
    (call,) = [d.tool_calls[0] for d in deltas if d.tool_calls]
    assert json.loads(call.function.arguments) == {"city": "Oslo"} and seen["text"]


def test_a_client_that_goes_away_stops_its_request(running):
    client = running.client()
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    before = running.engine.stats().aborted
    stream = client.completions.create(**ask, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: running.engine.stats().aborted == before + 1)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(**{**ask, "max_tokens": 240})
    wait_until(lambda: running.engine.stats().aborted == before + 2 and running.engine.stats().running == 0)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_more_requests_than_fit_are_queued_and_all_answered(running):
    client = running.client()

    def ask(i):
        stream = client.completions.create(model="tiny", prompt=f"n{i}", temperature=0, max_tokens=6, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    assert answers == [text_of(running, plain(running, running.tokenizer(f"n{i}")["input_ids"], 6)) for i in range(48)]


BAD = {
    "no messages": ("/chat/completions", {"messages": []}, "at least 1 item"),
    "a role that is none": ("/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "king"),
    "temperature": ("/chat/completions", {"messages": MESSAGES, "temperature": -1}, "temperature must be"),
    "top_p": ("/completions", {"prompt": "a", "top_p": 3}, "top_p must be above 0"),
    "n": ("/completions", {"prompt": "a", "n": 0}, "greater than or equal to 1"),
    "n without chance": ("/completions", {"prompt": "a", "n": 2, "temperature": 0}, "greedy completions are all"),
    "too many": ("/completions", {"prompt": "a", "n": 1000}, "128 completions"),
    "temperature beyond float32": ("/completions", {"prompt": "a", "temperature": 1e300}, "at most 1000"),
    "penalty beyond float32": ("/completions", {"prompt": "a", "repetition_penalty": 1e-300}, "from 0.001 to 1000"),
    "bias beyond float32": ("/completions", {"prompt": "a", "logit_bias": {"3": 1e300}}, "within 1,000,000,000"),
    "fewest above most": ("/completions", {"prompt": "a", "min_tokens": 9, "max_tokens": 2}, "min_tokens is more"),
    "a seed beyond 64 bits": ("/completions", {"prompt": "a", "seed": 2**64}, "seed must fit 64 bits"),
    "empty list": ("/completions", {"prompt": []}, "empty list"),
    "a number as text": ("/completions", {"prompt": "a", "max_tokens": "7"}, "max_tokens"),
    "a mistyped field": ("/completions", {"prompt": "a", "max_token": 7}, "'max_token' is not a field"),
    "a missing feature": ("/completions", {"prompt": "a", "suffix": "z"}, "'suffix' is not supported here"),
    "JSON mode": (
        "/chat/completions",
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        "'response_format' is not supported",
    ),
    "too long": ("/completions", {"prompt": "a" * 5000}, "token"),
    "too long a chat": ("/chat/completions", {"messages": [{"role": "user", "content": "a" * 5000}]}, "token"),
    "an id that is none": ("/completions", {"prompt": [99999]}, "token"),
    "bias": ("/completions", {"prompt": "a", "logit_bias": {"x": 1.0}}, "logit_bias must be token ids"),
    "calls without JSON": (
        "/chat/completions",
        {
            "messages": [
                *MESSAGES,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ]
        },
        "no JSON",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_told_what_is_wrong(running, case, stream):
    path, body, message = BAD[case]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        running.client().post(path, cast_to=object, body={"model": "tiny", "stream": stream, **body})
    assert caught.value.body["type"] == "invalid_request_error"
    assert running.engine.stats().running == 0


def test_numbers_larger_than_the_device_holds(running):
    """None of these may end the engine's thread."""
    for more in ({"top_k": 2**31}, {"top_k": 2**62}, {"stop_token_ids": [2**40]}, {"seed": 2**64 - 1}):
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 2, "extra_body": more}
        assert running.client().completions.create(**ask).choices
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 10**18, "extra_body": {"logit_bias": {"2": 1e6}}}
    assert running.client().completions.create(**ask).choices


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("completions", {"prompt": "\ud800"}),
    ],
)
def test_half_of_a_surrogate_pair(running, path, body):
    content = json.dumps({"model": "tiny", **body}).encode()  # the client itself cannot send it
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/{path}", headers=headers, content=content)
    assert answer.status_code == 400 and "the text is not Unicode" in answer.text


def test_a_model_that_is_not_there(running):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here"):
            running.client().completions.create(model="gpt-4", prompt="a", stream=stream)


def test_requests_beyond_the_limit_are_refused_not_lost(tiny):
    running = start(tiny(), max_requests=2)
    client = running.client()
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(**ask, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="2 completions are in flight") as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    wait_until(lambda: running.engine.stats().running == 0)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices
    running.stop()


@pytest.mark.parametrize(("drain", "reason"), [(30.0, "length"), (0.0, "abort")])
def test_the_end_lets_answers_finish_or_aborts_them(tiny, drain, reason):
    running = start(tiny(), drain_seconds=drain)
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = running.client().completions.create(**ask, stream=True)
    next(stream)
    ending = threading.Thread(target=running.stop)
    ending.start()
    assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] == reason
    ending.join()
    with pytest.raises(openai.APIConnectionError):
        running.client().models.list()
