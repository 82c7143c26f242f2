"""D07: unusual turns are rendered, repaired and counted, or refused with the row."""

import copy

import pytest

from unsloth.chat_templates import get_chat_template
from unsloth.core.errors import DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import prepare

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def trained(dataset, tokenizer, row):
    pairs = zip(dataset[row]["input_ids"], dataset[row]["labels"], strict=True)
    return tokenizer.decode([token for token, label in pairs if label != IGNORED])


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), user("b"), assistant("c")],
        [user("a"), assistant("b"), {"role": "system", "content": "s"}],
        [user("a"), {"role": "tool", "content": "r"}, assistant("b")],
        [assistant("b"), user("a")],
    ],
)
def test_a_template_that_needs_roles_in_turn_names_the_row(messages, tokenizer):
    tokenizer = get_chat_template(copy.deepcopy(tokenizer), "gemma-3")
    with pytest.raises(DataError, match="row 1.*roles") as raised:
        prepare([GOOD, {"messages": messages}], tokenizer, PrepareOptions(max_length=64))
    assert "get_chat_template" in str(raised.value)


def test_a_template_that_takes_any_roles_trains_the_assistant_only(tokenizer):
    messages = [
        user("a"),
        user("b"),
        {"role": "tool", "content": "r"},
        assistant("c"),
        {"role": "system", "content": "s"},
    ]
    dataset, _ = prepare([{"messages": messages}], tokenizer, PrepareOptions(max_length=128, train_on="responses"))
    assert trained(dataset, tokenizer, 0) == "c<|im_end|>\n"


def test_an_empty_answer_is_not_trained_and_counted(tokenizer):
    rows = [{"messages": [user("a"), assistant(""), user("b"), assistant("c")]}, GOOD]
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=128, train_on="responses"))
    assert trained(dataset, tokenizer, 0) == "c<|im_end|>\n"
    assert report.silent == 1 and "1 rows have an empty answer" in str(report)


def test_an_image_for_a_text_model_names_the_row(tokenizer):
    image = {"messages": [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("A cat.")]}
    with pytest.raises(DataError, match="row 1.*image.*FastVisionModel"):
        prepare([GOOD, image], tokenizer, PrepareOptions(max_length=64))


def test_parts_of_text_are_text(tokenizer):
    parts = {"messages": [user([{"type": "text", "text": "q"}]), assistant("a")]}
    dataset, _ = prepare([GOOD, parts], tokenizer, PrepareOptions(max_length=64))
    assert dataset[0] == dataset[1]


def test_a_message_can_be_left_out_by_its_weight(tokenizer):
    rows = [{"messages": [user("a"), {**assistant("b"), "weight": 0}, user("c"), {**assistant("d"), "weight": 1}]}]
    dataset, _ = prepare(rows, tokenizer, PrepareOptions(max_length=128, train_on="responses"))
    assert trained(dataset, tokenizer, 0) == "d<|im_end|>\n"
    with pytest.raises(DataError, match="row 0, message 1.*weight"):
        rows[0]["messages"][1]["weight"] = 0.5
        prepare(rows, tokenizer, PrepareOptions(max_length=128, train_on="responses"))
