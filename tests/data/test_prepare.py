import pytest
from datasets import Dataset, IterableDataset

from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.data import demo
from unsloth.data.collate import Collator
from unsloth.data.masking import IGNORED, ResponseMarkers
from unsloth.data.prepare import PrepareOptions, prepare


def test_text_gets_one_end_of_text_and_is_counted(tokenizer):
    rows = [{"text": "abc"}, {"text": "abc<|im_end|>"}, {"text": "abcdefghij"}]
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=8))
    assert [tokenizer.decode(ids) for ids in dataset["input_ids"]] == ["abc<|im_end|>", "abc<|im_end|>", "abcdefgh"]
    assert (report.rows, report.truncated, report.dropped, report.tokens, report.trained_tokens) == (3, 1, 0, 16, 13)


def test_sharegpt_and_openai_rows_are_the_same(tokenizer):
    openai = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    sharegpt = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    options = PrepareOptions(max_length=None)
    assert prepare(openai, tokenizer, options)[0][0] == prepare(sharegpt, tokenizer, options)[0][0]


def test_rows_without_a_response_are_dropped_and_counted(tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    markers = ResponseMarkers("<|im_start|>user\n", "<|im_start|>assistant\n")
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=64, responses=markers))
    assert len(dataset) == 1 and report.dropped == 1
    with pytest.raises(DataError, match="<\\|im_start\\|>user"):
        prepare(rows[:1], tokenizer, PrepareOptions(max_length=64, responses=markers))


def test_a_formatting_function_may_work_on_a_row_or_a_batch(tokenizer):
    rows = [{"q": f"{i}", "a": f"{i + 1}"} for i in range(5)]
    one = PrepareOptions(max_length=64, formatting=lambda row: f"{row['q']} {row['a']}")
    many = PrepareOptions(
        max_length=64,
        formatting=lambda rows: [f"{q} {a}" for q, a in zip(rows["q"], rows["a"], strict=True)],
    )
    assert prepare(rows, tokenizer, one)[0]["input_ids"][:] == prepare(rows, tokenizer, many)[0]["input_ids"][:]
    with pytest.raises(DataError, match="row 0.*KeyError"):
        prepare(rows, tokenizer, PrepareOptions(max_length=64, formatting=lambda row: row["nothing"]))


def test_streamed_data_is_prepared_as_it_is_read(tokenizer):
    stream = IterableDataset.from_generator(lambda: iter([{"text": "abc"}, {"text": "de"}]))
    dataset, report = prepare(stream, tokenizer, PrepareOptions(max_length=16))
    assert report is None
    assert [sorted(row) for row in dataset] == [["input_ids", "labels"]] * 2


def test_refusals(tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="max_length"):
        PrepareOptions(max_length=1)
    with pytest.raises(DataError, match="row 1"):
        prepare([{"text": "a"}, "b"], tokenizer, PrepareOptions(max_length=8))
    with pytest.raises(DataError, match="labels"):
        prepare([{"input_ids": [5, 6], "labels": [5]}], tokenizer, PrepareOptions(max_length=8))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TokenizerError, match="chat template"):
        prepare([{"messages": [{"role": "user", "content": "q"}]}], tokenizer, PrepareOptions(max_length=8))


def test_batches(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    padded = Collator(pad_token_id=3, pad_to_multiple_of=4)(rows)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 3], [8, 3, 3, 3]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert padded["labels"].tolist() == [[5, 6, 7, IGNORED], [8, IGNORED, IGNORED, IGNORED]]
    flat = Collator(pad_token_id=3)([{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows])
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert flat["labels"].tolist() == [[IGNORED, 6, 7, IGNORED]]


def test_the_demo_data_keeps_its_promises():
    train, heldout = demo.train_rows(), demo.heldout_rows()
    assert (len(train), len(heldout)) == (360, 48)
    for position in (1, 2):
        seen = {row["messages"][position]["content"].lower() for row in train}
        assert len(seen) == 360
        assert not seen & {row["messages"][position]["content"].lower() for row in heldout}
    assert isinstance(Dataset.from_list(train), Dataset)
