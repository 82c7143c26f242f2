"""D03: templates and special tokens that are missing, doubled or wrong; ids and labels equal a golden file."""

import copy
import json
import logging
from pathlib import Path

import pytest

from unsloth.chat_templates import get_chat_template
from unsloth.core.errors import TokenizerError
from unsloth.data.collate import Collator
from unsloth.data.encode import PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import prepare

GOLDEN = json.loads(Path(__file__).with_name("golden_D03.json").read_text(encoding="utf-8"))
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo ü"}]},
    {"text": "plain"},
]
RESPONSES = PrepareOptions(max_length=None, train_on="responses")


@pytest.fixture
def fresh(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("unsloth"), "propagate", True)
    caplog.set_level(logging.INFO, logger="unsloth")
    return caplog


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_ids_and_labels_equal_the_golden_file(name, fresh):
    fresh.bos_token = "<|endoftext|>"
    dataset, _ = prepare(ROWS[:1], get_chat_template(fresh, name), RESPONSES)
    assert dataset[0]["input_ids"] == GOLDEN[name]["input_ids"]
    assert dataset[0]["labels"] == GOLDEN[name]["labels"]


def test_no_template_names_the_function_that_sets_one(fresh):
    fresh.chat_template = None
    with pytest.raises(TokenizerError, match="get_chat_template"):
        prepare(ROWS[:1], fresh, RESPONSES)


def test_a_template_without_an_end_is_said(fresh, said):
    fresh.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    prepare(ROWS[:1], fresh, PrepareOptions(max_length=None))
    assert "would not learn to stop" in said.text and "get_chat_template" in said.text


def test_an_end_that_is_not_the_tokenizers_is_said(fresh, said):
    fresh.eos_token = "<|endoftext|>"
    prepare(ROWS[:1], fresh, PrepareOptions(max_length=None))
    assert "'<|im_end|>'" in said.text and "tokenizer.eos_token = '<|im_end|>'" in said.text


def test_a_good_template_is_not_complained_about(fresh, said):
    prepare(ROWS[:1], fresh, PrepareOptions(max_length=None))
    assert said.text == ""


def test_a_second_begin_of_text_is_removed_and_counted(fresh):
    fresh.bos_token = "<|endoftext|>"
    rows = [{"text": "<|endoftext|><|endoftext|>a"}, {"text": "<|endoftext|>a"}]
    dataset, report = prepare(rows, fresh, PrepareOptions(max_length=None))
    assert dataset[0]["input_ids"] == dataset[1]["input_ids"] and report.double_bos == 1


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_the_end_is_trained_whatever_the_padding(fresh, pad):
    fresh.pad_token = pad
    rows = [*ROWS[:1], {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A" * 9}]}]
    dataset, _ = prepare(rows, fresh, RESPONSES)
    batch = Collator(fresh.pad_token_id)(list(dataset))
    for labels in batch["labels"].tolist():
        trained = [label for label in labels if label != IGNORED]
        assert trained[-2:] == fresh("<|im_end|>\n")["input_ids"]
    assert batch["attention_mask"].sum().item() == sum(len(row["input_ids"]) for row in dataset)


def test_text_ends_once(fresh):
    rows = [{"text": "a"}, {"text": "a<|im_end|>"}, {"text": "a<|im_end|>\n"}]
    dataset, _ = prepare(rows, fresh, PrepareOptions(max_length=None))
    assert [fresh.decode(ids) for ids in dataset["input_ids"]] == ["a<|im_end|>", "a<|im_end|>", "a<|im_end|>\n"]
    fresh.eos_token = None
    assert fresh.decode(prepare(ROWS[1:], fresh, PrepareOptions(max_length=None))[0][0]["input_ids"]) == "plain"
