"""Hostile conversations: random ones against the templates of their makers, and their masks token by token."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from unsloth.chat_templates import get_chat_template
from unsloth.core.errors import DataError
from unsloth.data.conversation import Conversation
from unsloth.data.encode import PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import prepare
from unsloth.data.render import ChatRenderer

JUDGES = Path(trl.__file__).parent / "chat_templates"
TEXTS = [
    *(
        "hi",
        "",
        " a ",
        "\n",
        "\n\nx\n",
        "ü漢😀",
        "  two",
        "42 7",
        "'s",
        "\u0301e",
        "the end.\n\n",
        ":",
        "\t",
        "assistant",
    ),
    *("{{ x }} {% raw %}", "<think>x</think> y", "<think>\nr\n</think>\n\nb", "</think>", "'\"\\", "\u200bq", "Hello"),
    "<tool_response>x</tool_response>",
]
SHAPES = [
    *(["user"], ["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 3, ["system"]),
    *(["user", "user", "assistant"], ["user", "assistant", "assistant"], ["assistant", "user"], ["tool"]),
    *(
        ["user", "system", "assistant"],
        ["system", "system", "user"],
        ["user", "assistant", "tool", "tool", "assistant"],
    ),
    ["system", *["user", "assistant", "tool", "assistant"] * 2],
]
PLAIN = [shape for shape in SHAPES if "tool" not in shape]
TOOL = {
    "name": "f",
    "description": 'Does <b>it</b> & "so".',
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
}


def message(draw, role):
    made = {"role": role, "content": draw.choice(TEXTS)}
    if role == "assistant" and draw.random() < 0.2:
        made["reasoning_content"] = draw.choice(TEXTS)
    if role == "assistant" and draw.random() < 0.25:
        arguments = draw.choice([{"a": "Zürich", "b": [1]}, {}, {"a": '"q" <x>'}])
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        made |= {"tool_calls": calls * draw.choice([1, 1, 2])}
    return made


def conversations(shapes, count, seed=1):
    draw = random.Random(seed)
    for _ in range(count):
        variables = {"tools": [{"type": "function", "function": TOOL}]} if draw.random() < 0.3 else {}
        if draw.random() < 0.4:
            variables |= {"add_generation_prompt": True, "enable_thinking": draw.choice([True, False])}
        yield [message(draw, role) for role in draw.choice(shapes)], variables


@pytest.mark.parametrize(
    ("name", "file", "shapes"),
    [
        ("llama-3", "llama3", SHAPES),
        ("llama-3.1", "llama3_1", SHAPES),
        ("llama-3.2", "llama3_2", SHAPES),
        ("llama-3.3", "llama3_1", SHAPES),
        ("phi-3", "phi3", PLAIN),  # with a tool's result theirs leaves it out, ours refuses the row
        ("phi-3.5", "phi3_5", PLAIN),
        ("qwen-2.5", "qwen2_5", SHAPES),
        ("qwen-3", "qwen3", SHAPES),
        ("gemma", "gemma", [shape for shape in SHAPES if shape[0] != "system"]),  # theirs has no system message
        ("gemma-3", "gemma3", SHAPES),
    ],
)
def test_random_conversations_are_rendered_or_refused_as_by_the_judge(name, file, shapes, tokenizer):
    tokenizer = get_chat_template(copy.deepcopy(tokenizer), name, map_eos_token=False)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    renderer = ChatRenderer(tokenizer)
    source = (JUDGES / f"{file}.jinja").read_text(encoding="utf-8")
    rendered = 0
    for messages, variables in conversations(shapes, 150):
        prompt = variables.get("add_generation_prompt", False)
        conversation = Conversation(messages, variables.get("tools"), variables)
        try:
            expected = render_jinja_template(
                [messages], chat_template=source, bos_token="<s>", eos_token="</s>", **variables
            )[0][0]
        except TemplateError:
            with pytest.raises(DataError, match="row 0"):
                renderer.render(conversation, 0, prompt)
        else:
            assert renderer.render(conversation, 0, prompt).text == expected
            rendered += 1
    assert rendered >= 50


def test_arguments_that_are_json_text_are_written_as_the_object_they_are(tokenizer):
    """The makers of Llama and Qwen 2.5 would write them as one string, which no parser of calls reads."""
    for name in ("llama-3.1", "qwen-2.5", "qwen-3", "gpt-oss"):
        renderer = ChatRenderer(get_chat_template(copy.deepcopy(tokenizer), name, map_eos_token=False))
        texts = []
        for arguments in ({"a": 1}, '{"a": 1}'):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            texts.append(renderer.render(Conversation(talk), 0).text)
        assert texts[0] == texts[1]


CONTROL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>"]
CORPUS = [
    "the end of the story\n\nand the start of it\n",
    "User: hi\nAssistant: Hello there, hi you\n\n\n",
    "a: : b > c ",
]


def sentencepiece_like(normalizer, split=None, special=(), **options):
    """BPE over characters with ``▁`` for spaces, and bytes for what it does not know, as in SentencePiece models."""
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS * 20, trainers.BpeTrainer(vocab_size=200))
    state = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *state["vocab"]]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in state["merges"]]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizer
    if split is not None:
        made.pre_tokenizer = split
    made.add_special_tokens([AddedToken(name, special=True, normalized=False, **options) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def spaces(prepend):
    replace = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace


@pytest.fixture(scope="module")
def kinds():
    return {
        "llama": sentencepiece_like(spaces(True), special=CONTROL[:2]),
        "gemma": sentencepiece_like(
            spaces(False), pre_tokenizers.Split(" ", "merged_with_previous"), [*CONTROL, "<end_of_turn>"]
        ),
        "phi": sentencepiece_like(spaces(True), special=CONTROL, rstrip=True),
    }


def expected_of(tokenizer, messages):
    """Ids and labels without the library: an answer is what a longer rendering has beyond its generation prompt."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, said in enumerate(messages):
        if said["role"] == "assistant" and said["content"]:
            start = len(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            ended = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            end = len(whole) if i == len(messages) - 1 else len(ended)
            assert whole[:start] == ended[:start] and whole.startswith(ended[: len(ended) - 1])
            spans.append((start, end))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    labels = [
        token if any(a < end and b > start and not (a < start and name in CONTROL) for start, end in spans) else IGNORED
        for token, name, (a, b) in zip(encoded["input_ids"], names, encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("llama", name) for name in ("unsloth", "alpaca", "vicuna", "vicuna_old", "zephyr", "chatml")),
        *(("llama", name) for name in ("llama", "mistral")),
        *(("gemma", name) for name in ("gemma", "gemma-3", "gemma-3n", "gemma_chatml", "unsloth")),
        *(("phi", name) for name in ("phi-3", "zephyr", "phi-4")),
    ],
)
def test_masks_where_tokens_reach_over_the_borders_of_messages(kind, name, kinds):
    tokenizer = get_chat_template(copy.deepcopy(kinds[kind]), name)
    in_turn = name in ("llama", "mistral", "gemma", "gemma-3", "gemma-3n")
    draw = random.Random(7)
    shapes = [shape for shape in PLAIN if "assistant" in shape and shape[0] != "assistant"]
    shapes = [["user", "assistant"] * 3] if in_turn else shapes
    rows = []
    while len(rows) < 60:
        shape = draw.choice(shapes)
        if "system" in shape[1:] and name in ("unsloth", "alpaca", "vicuna", "vicuna_old"):
            continue
        rows.append({"messages": [{"role": role, "content": draw.choice(TEXTS)} for role in shape]})
    rows = [row for row in rows if any(m["role"] == "assistant" and m["content"].strip() for m in row["messages"])]
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=None, train_on="responses"))
    assert report.dropped == 0
    for row, made in zip(rows, dataset, strict=True):
        ids, labels = expected_of(tokenizer, row["messages"])
        assert ids == tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert (made["input_ids"], made["labels"]) == (ids, labels)


def test_the_first_word_of_an_answer_is_trained_where_it_shares_a_token_with_the_header(kinds):
    tokenizer = get_chat_template(copy.deepcopy(kinds["llama"]), "unsloth")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there"}]}]
    dataset, _ = prepare(rows, tokenizer, PrepareOptions(max_length=None, train_on="responses"))
    trained = [label for label in dataset[0]["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(trained)[0].startswith("▁H")


def test_what_a_table_filled_in_is_not_written(tokenizer):
    """Arrow gives every call the arguments of all calls, with None for those that it lacks."""
    talks = []
    for arguments in ({"a": 1}, {"b": {"c": [None, "d"]}}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        talks.append([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}])
    tokenizer = get_chat_template(copy.deepcopy(tokenizer), "qwen-3")
    rows = [{"messages": talk, "tools": [TOOL]} for talk in talks]
    table = Dataset.from_list(rows)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    options = PrepareOptions(max_length=None)
    from_table, from_list = (prepare(kind, tokenizer, options)[0] for kind in (table, rows))
    assert from_table[:] == from_list[:]
    assert '"arguments": {"b": {"c": [null, "d"]}}' in tokenizer.decode(from_table[1]["input_ids"])


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        ({}, 0),
        ({"thinking": "Hm."}, 1),
        ({"tool_calls": [{"name": "f", "arguments": {}}]}, 1),
        ({"tool_calls": '[{"name": "f", "arguments": {}}]'}, 1),
    ],
)
def test_what_a_template_does_not_write_is_counted(more, counted, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **more}]}]
    _, report = prepare(rows, tokenizer, PrepareOptions(max_length=None))
    assert report.unwritten == counted
    assert ("that the chat template does not write" in str(report)) == bool(counted)
    _, report = prepare(rows, get_chat_template(copy.deepcopy(tokenizer), "qwen-3"), PrepareOptions(max_length=None))
    assert report.unwritten == 0


@pytest.mark.parametrize("calls", ["f", "no json", [1], [{"function": "f"}], [{"name": "f"}], {"name": "f"}])
def test_calls_that_are_none_name_the_row(calls, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}]
    with pytest.raises(DataError, match="row 0.*tool_calls"):
        prepare(rows, tokenizer, PrepareOptions(max_length=None))
