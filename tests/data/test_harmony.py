"""The Harmony format against what the package openai-harmony 0.0.8 renders (kept in a file), and its own ids."""

import copy
import importlib.util
import json
import os
from pathlib import Path

import pytest

from unsloth.chat_templates import get_chat_template
from unsloth.core.errors import ConfigError, TokenizerError
from unsloth.data import harmony
from unsloth.data.conversation import Conversation
from unsloth.data.render import ChatRenderer
from unsloth_zoo import encode_conversations_with_harmony

GOLDEN = json.loads(Path(__file__).with_name("golden_harmony.json").read_text(encoding="utf-8"))
PACKAGE = importlib.util.find_spec("openai_harmony") is not None and "TIKTOKEN_ENCODINGS_BASE" in os.environ


@pytest.mark.parametrize("entry", GOLDEN["rendered"], ids=lambda entry: entry["case"])
def test_text_equals_that_of_the_package(entry):
    text = harmony.render_harmony(
        GOLDEN["conversations"][entry["case"]],
        reasoning_effort="high",
        add_generation_prompt=entry["add_generation_prompt"],
        tool_calls=GOLDEN["tools"] if entry["tools"] else None,
        developer_instructions=entry["instructions"],
        date="2025-06-28",
    )
    assert text == entry["text"]


@pytest.mark.parametrize("case", ["question", "answer after a call", "open call"])
def test_the_chat_template_writes_the_same_where_no_thought_is_dropped(case, tokenizer):
    renderer = ChatRenderer(get_chat_template(copy.deepcopy(tokenizer), "gpt-oss"))
    messages = GOLDEN["conversations"][case]
    for tools in (None, GOLDEN["tools"]):
        for prompt in (True, False):
            conversation = Conversation(messages, tools, {"reasoning_effort": "low"})
            expected = harmony.render_harmony(messages, "low", prompt, tools)
            assert renderer.render(conversation, 0, prompt).text == expected


@pytest.mark.parametrize("number", range(len(GOLDEN["declared"])))
def test_tools_of_any_shape_are_declared_as_by_the_package(number, tokenizer):
    entry = GOLDEN["declared"][number]
    messages = [{"role": "user", "content": "hi"}]
    renderer = ChatRenderer(get_chat_template(copy.deepcopy(tokenizer), "gpt-oss"))
    assert entry["text"] in harmony.render_harmony(messages, tool_calls=[entry["tool"]])
    assert entry["text"] in renderer.render(Conversation(messages, [entry["tool"]]), 0).text


def test_a_system_message_is_taken_for_instructions():
    messages = [{"role": "system", "content": "Second."}, {"role": "user", "content": "hi"}]
    text = harmony.render_harmony(messages, developer_instructions="First.")
    assert "<|start|>developer<|message|># Instructions\n\nFirst.\n\nSecond.<|end|>" in text
    assert "Reasoning: medium" in text and harmony.IDENTITY in text


def test_ids_are_those_of_the_tokenizer(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    ids = encode_conversations_with_harmony(messages, tokenizer=tokenizer)
    assert tokenizer.decode(ids) == harmony.render_harmony(messages)


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="reasoning_effort"):
        harmony.render_harmony([{"role": "user", "content": "hi"}], "huge")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="openai-harmony"):
        encode_conversations_with_harmony([{"role": "user", "content": "hi"}])


@pytest.mark.skipif(
    not PACKAGE, reason="needs the package openai-harmony, and its vocabulary in TIKTOKEN_ENCODINGS_BASE"
)
def test_ids_equal_those_of_the_package():
    import openai_harmony

    encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    for name, messages in GOLDEN["conversations"].items():
        ids = encode_conversations_with_harmony(messages)
        assert ids == encoding.encode(harmony.render_harmony(messages), allowed_special="all"), name
