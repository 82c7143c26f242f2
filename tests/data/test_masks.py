"""Label masks against TRL's templates with generation marks, token by token, through transformers' own mask."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import trl

from unsloth.data import masking
from unsloth.data.encode import PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import prepare

JUDGES = Path(trl.__file__).parent / "chat_templates"
TALKS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <b>ü</b>"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "漢 😀\n"},
        {"role": "assistant", "content": " two "},
    ],
]


@pytest.mark.parametrize(
    "name", ["llama3", "gemma", "gemma3", "cohere", "lfm2", "qwen2_5_vl", "qwen3_vl", "qwen3_instruct_2507"]
)
def test_masks_equal_those_of_generation_marks(name, tokenizer):
    """The plain template is masked by us, the one with marks by transformers."""
    judge = copy.deepcopy(tokenizer)
    judge.bos_token = "<|endoftext|>"
    judge.chat_template = (JUDGES / f"{name}_training.jinja").read_text(encoding="utf-8")
    ours = copy.deepcopy(judge)
    ours.chat_template = (JUDGES / f"{name}.jinja").read_text(encoding="utf-8")
    rows = [{"messages": talk} for talk in TALKS]
    dataset, _ = prepare(rows, ours, PrepareOptions(max_length=None, train_on="responses"))
    for row, talk in zip(dataset, TALKS, strict=True):
        expected = judge.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        assert row["input_ids"] == expected["input_ids"]
        assert [int(label != IGNORED) for label in row["labels"]] == expected["assistant_masks"]


@pytest.mark.parametrize("spans", [[], [(0, 3)], [(2, 5), (7, 9)], [(4, 100)], [(9, 11)]])
def test_looking_up_the_ends_equals_looking_at_every_token(spans, tokenizer):
    text = "aü 漢😀bc<|im_end|>\nde"
    spans = [(start, min(end, len(text))) for start, end in spans]
    batch = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    ids = batch["input_ids"][0]
    slow = masking.label_spans(ids, batch["offset_mapping"][0], spans)
    assert masking.label_encoding(ids, batch.encodings[0], spans) == slow


@pytest.mark.model
def test_with_the_tokenizer_of_a_real_model(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [{"messages": talk} for talk in TALKS]
    dataset, _ = prepare(rows, tokenizer, PrepareOptions(max_length=None, train_on="responses"))
    for row, talk in zip(dataset, TALKS, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(talk, return_dict=False)
        trained = [label for label in row["labels"] if label != IGNORED]
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{answer}<|im_end|>\n" for answer in answers)
