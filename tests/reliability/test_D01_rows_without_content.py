"""D01: data sets that are empty or hold the wrong things are refused before any model is needed."""

import pytest
from datasets import Dataset

from unsloth.core.errors import DataError, UnslothError
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare

ANSWER = {"role": "assistant", "content": "a"}


def talk(*messages):
    return [{"messages": [{"role": "user", "content": "q"}, ANSWER]}, {"messages": list(messages)}]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["no rows"]),
        (Dataset.from_dict({"text": []}), ["no rows", "text"]),
        (Dataset.from_list([{"text": "a"}]).filter(lambda row: False), ["no rows", "filter"]),
        ([{"txt": "a"}], ["'text'", "['txt']", "Accepted are", "dataset_text_field"]),
        ([{"text": "a"}, {"text": None}], ["row 1", "None", "dataset.filter"]),
        ([{"text": "a"}, {"text": ""}], ["row 1", "''", "dataset.filter"]),
        ([{"text": "a"}, {"text": " \n"}], ["row 1", "dataset.filter"]),
        ([{"text": "a"}, {"text": 7}], ["row 1", "got 7"]),
        ([{"text": "a"}, {"other": "b"}], ["row 1", "'text'"]),
        ([{"text": ["a", "b"]}], ["row 0", "['a', 'b']"]),
        (talk(), ["row 1", "non-empty list"]),
        (talk({"role": "user", "content": None}), ["row 1, message 0", "content", "None"]),
        (talk({"role": "user", "content": 5}), ["row 1, message 0", "got 5"]),
        (talk({"role": None, "content": "a"}), ["row 1, message 0", "role"]),
        (talk({"role": "narrator", "content": "a"}), ["row 1, message 0", "narrator", "user"]),
        (talk({"speaker": "user", "text": "a"}), ["row 1, message 0", "'role' and 'content'", "speaker"]),
        (talk("hello"), ["row 1, message 0", "mapping", "hello"]),
        ([{"messages": "hello"}], ["row 0", "list", "hello"]),
        ([{"messages": None}], ["row 0", "messages"]),
        ([{"instruction": "i", "output": None}], ["row 0", "'output'", "dataset.filter"]),
        ([{"instruction": float("nan"), "output": "o"}], ["row 0", "'instruction'"]),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], ["DPOTrainer"]),
        ([{"prompt": "p", "completion": "c", "label": True}], ["KTOTrainer"]),
        ([{"question": "q", "answer": "a"}], ["question", "GRPOTrainer"]),
        ([{"prompt": "p", "completion": None}], ["row 0", "'completion'"]),
        ({"train": [{"text": "a"}]}, ["splits", 'dataset["train"]']),
        (7, ["int"]),
        ([{"text": "a"}, 7], ["row 1", "mapping"]),
    ],
)
def test_what_is_wrong_is_named(rows, parts, tokenizer):
    with pytest.raises(DataError) as raised:
        prepare(rows, tokenizer, PrepareOptions(max_length=64))
    message = str(raised.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 5 and isinstance(raised.value, UnslothError)


def test_rows_of_mixed_shape_are_read(tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, ANSWER], "id": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {**ANSWER, "name": "x"}]},
    ]
    dataset, report = prepare(rows[:1] + rows[:1], tokenizer, PrepareOptions(max_length=64))
    assert len(dataset) == report.rows == 2
