"""Every template against an independent rendering: the templates that TRL ships, or the format written by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from unsloth.chat_templates import CHAT_TEMPLATES, get_chat_template
from unsloth.data.conversation import Conversation
from unsloth.data.render import ChatRenderer
from unsloth.data.template_library import find
from unsloth.data.turns import TurnReader

JUDGES = Path(trl.__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            },
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1]}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief. "}
RESULT = {"role": "tool", "name": "get_weather", "content": "22 degrees"}
PLAIN = [
    [user("a")],
    [user("a"), assistant("b")],
    [user("a"), assistant("b"), user("ü 漢 😀 {{ x }}"), assistant("")],
    [user(" a\n"), assistant("<think>\nx\n</think>\n\nb "), user("c"), assistant("<think>\ny\n</think>\n\nd")],
    [user("a"), assistant("b", reasoning_content="r1"), user("c"), assistant("d", reasoning_content="r2")],
]
THINKING = [[user("a"), assistant("b", thinking="t1"), user("c"), assistant("d", thinking="t2")]]
WITH_SYSTEM = [[SYSTEM, user(" a\n"), assistant("b ")], [SYSTEM, user("a"), assistant("b"), user("c")]]
WITH_TOOLS = [
    [SYSTEM, user("a"), assistant("", tool_calls=[CALL]), RESULT, assistant("e")],
    [user("a"), assistant("", tool_calls=[CALL]), RESULT, assistant("e"), user("x"), assistant("", tool_calls=[CALL])],
    [user("a"), assistant("I look.", tool_calls=[CALL])],
]
SWITCHES = [{}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}]


def ours(name, messages, variables, tokenizer):
    tokenizer = get_chat_template(copy.deepcopy(tokenizer), name, map_eos_token=False)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    conversation = Conversation(messages, variables.get("tools"), variables)
    rendered = ChatRenderer(tokenizer).render(conversation, 0, bool(variables.get("add_generation_prompt")))
    plain = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    assert plain == rendered.text, "our renderer and that of transformers differ"
    return rendered.text


def judge(file, messages, variables):
    source = (JUDGES / f"{file}.jinja").read_text(encoding="utf-8")
    texts, _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", eos_token="</s>", **variables)
    return texts[0]


@pytest.mark.parametrize(
    ("name", "file", "cases"),
    [
        ("llama-3", "llama3", PLAIN + WITH_SYSTEM),
        ("llama-3.1", "llama3_1", PLAIN + WITH_SYSTEM),
        ("llama-3.2", "llama3_2", PLAIN + WITH_SYSTEM),
        ("phi-3", "phi3", PLAIN + WITH_SYSTEM),
        ("phi-3.5", "phi3_5", PLAIN + WITH_SYSTEM),
        ("qwen-2.5", "qwen2_5", PLAIN + WITH_SYSTEM),
        ("qwen-3", "qwen3", PLAIN + WITH_SYSTEM),
        ("gemma", "gemma", PLAIN),
        ("gemma2", "gemma", PLAIN),
        ("gemma-3", "gemma3", PLAIN + WITH_SYSTEM),
        ("gpt-oss", "gptoss", PLAIN[:4] + THINKING),
    ],
)
def test_conversations_are_rendered_as_by_the_judge(name, file, cases, tokenizer):
    for messages in cases:
        for switches in SWITCHES:
            assert ours(name, messages, switches, tokenizer) == judge(file, messages, switches)


@pytest.mark.parametrize(
    ("name", "file"),
    [("llama-3.1", "llama3_1"), ("llama-3.2", "llama3_2"), ("qwen-2.5", "qwen2_5"), ("qwen-3", "qwen3")],
)
def test_tools_are_rendered_as_by_the_judge(name, file, tokenizer):
    for messages in WITH_SYSTEM + WITH_TOOLS:
        for switches in SWITCHES:
            variables = {"tools": [TOOL], **switches}
            assert ours(name, messages, variables, tokenizer) == judge(file, messages, variables)


def by_hand(system, user_turn, assistant_turn, prompt):
    """A format as one function: what is written for a system message, a user's, an assistant's, and at the end."""

    def render(messages, add_generation_prompt=False):
        parts = []
        for message in messages:
            turn = {"system": system, "user": user_turn, "assistant": assistant_turn}[message["role"]]
            parts.append(turn(message["content"]))
        return "".join(parts) + (prompt if add_generation_prompt else "")

    return render


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
HANDS = {
    "chatml": by_hand(
        lambda t: f"<|im_start|>system\n{t}<|im_end|>\n",
        lambda t: f"<|im_start|>user\n{t}<|im_end|>\n",
        lambda t: f"<|im_start|>assistant\n{t}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "phi-4": by_hand(
        lambda t: f"<|im_start|>system<|im_sep|>{t}<|im_end|>",
        lambda t: f"<|im_start|>user<|im_sep|>{t}<|im_end|>",
        lambda t: f"<|im_start|>assistant<|im_sep|>{t}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
    "zephyr": by_hand(
        lambda t: f"<|system|>\n{t}</s>\n",
        lambda t: f"<|user|>\n{t}</s>\n",
        lambda t: f"<|assistant|>\n{t}</s>\n",
        "<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("name", sorted(HANDS))
def test_formats_written_by_hand(name, tokenizer):
    for messages in PLAIN[:3] + WITH_SYSTEM:
        for switches in SWITCHES[:2]:
            assert ours(name, messages, switches, tokenizer) == HANDS[name](messages, **switches)


TALK = [user("Hi"), assistant("Hello"), user("Bye")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "unsloth",
            "<s>You are a helpful assistant to the user\n"
            ">>> User: Hi\n>>> Assistant: Hello</s>\n>>> User: Bye\n>>> Assistant: ",
        ),
        ("mistral", "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]"),
        ("llama", "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]"),
        ("vicuna", f"<s>{VICUNA} USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:"),
        (
            "vicuna_old",
            f"<s>{VICUNA.replace('curious user', 'curious human').replace('the user', 'the human')}\n"
            "### Human: Hi\n### Assistant: Hello</s>\n### Human: Bye\n### Assistant:",
        ),
        (
            "alpaca",
            f"<s>{ALPACA}### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        ),
        (
            "gemma_chatml",
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "gemma-3n",
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_older_formats_of_one_conversation(name, expected, tokenizer):
    assert ours(name, TALK, {"add_generation_prompt": True}, tokenizer) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral", "<s>[INST] Be brief. \n\nHi [/INST]"),
        ("llama", "<s>[INST] <<SYS>>\nBe brief. \n<</SYS>>\n\nHi [/INST]"),
        ("gemma", "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"),
        ("vicuna", "<s>Be brief.  USER: Hi "),
    ],
)
def test_system_messages_where_a_format_has_no_such_role(name, expected, tokenizer):
    assert ours(name, [SYSTEM, user("Hi")], {}, tokenizer) == expected


def test_images_of_gemma_3(tokenizer):
    messages = [user([{"type": "image"}, {"type": "text", "text": " What? "}]), assistant("A cat.")]
    assert ours("gemma-3", messages, {}, tokenizer) == judge("gemma3", messages, {})


def test_every_documented_name_is_there_in_its_spellings():
    documented = (
        "unsloth zephyr chatml mistral llama vicuna vicuna_old alpaca gemma gemma_chatml gemma2 gemma2_chatml llama-3 "
        "llama3 phi-3 phi-35 phi-3.5 llama-3.1 llama-31 llama-3.2 llama-3.3 llama-32 llama-33 qwen-2.5 qwen-25 qwen25 "
        "qwen2.5 phi-4 gemma-3 gemma3 gemma-3n qwen-3 gpt-oss"
    ).split()
    for name in [*documented, "vicuna old"]:
        template, stop = CHAT_TEMPLATES[name]
        assert name in CHAT_TEMPLATES and name in list(CHAT_TEMPLATES)
        assert "messages" in template and (stop == "eos_token" or stop in template or "chatml" in name)
    assert find("Llama 3.1") is find("llama-31")
    with pytest.raises(KeyError):
        CHAT_TEMPLATES["nothing"]


@pytest.mark.parametrize("name", sorted({find(name).file for name in CHAT_TEMPLATES}))
def test_what_the_assistant_wrote_is_known_for_every_template(name, tokenizer):
    """Also with another turn's header inside a user's message, and for a template that treats the last turn apart."""
    tokenizer = get_chat_template(copy.deepcopy(tokenizer), name)
    tokenizer.bos_token = "<s>"
    renderer = ChatRenderer(tokenizer)
    reader = TurnReader.of(renderer)
    header = reader.headers[0] if reader.headers else "[/INST]"
    messages = [user("one"), assistant("two <b>"), user(f"three {header}nothing"), assistant("four")]
    conversation = Conversation(messages)
    rendered = renderer.render(conversation, 0)
    trained = [rendered.text[start:end] for start, end in reader.spans(rendered, conversation, 0)]
    assert len(trained) == 2 and "two <b>" in trained[0] and "four" in trained[1]
    stop = tokenizer.eos_token
    assert all("three" not in part and "one" not in part for part in trained)
    assert trained[1].rstrip().endswith(stop)
    last = reader.spans(rendered, conversation, 0, last_only=True)
    assert [rendered.text[start:end] for start, end in last] == trained[1:]
