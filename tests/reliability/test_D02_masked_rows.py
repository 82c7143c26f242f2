"""D02: rows without a trained token, half masked rows, long rows, and packing with a single short row."""

import pytest

from unsloth.core.errors import DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.masking import IGNORED
from unsloth.data.prepare import prepare


def tokens(length, trained):
    ids = list(range(4, 4 + length))
    return {"input_ids": ids, "labels": [IGNORED] * (length - trained) + ids[length - trained :]}


def test_all_masked_is_an_error_that_shows_the_row(tokenizer):
    with pytest.raises(DataError, match="no row has a token to train"):
        prepare([tokens(5, 0)], tokenizer, PrepareOptions(max_length=8))
    rows = [{"messages": [{"role": "user", "content": "only asked"}]}]
    with pytest.raises(DataError, match="only asked"):
        prepare(rows, tokenizer, PrepareOptions(max_length=64, train_on="responses"))
    answered = [{"messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}]}]
    with pytest.raises(DataError, match="within 16 tokens"):
        prepare(answered, tokenizer, PrepareOptions(max_length=16, train_on="responses"))


def test_the_share_of_trained_tokens_is_counted(tokenizer):
    rows = [tokens(10, 4)] * 6 + [tokens(10, 0)] * 4
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=16))
    assert (report.dropped, report.tokens, report.trained_tokens, len(dataset)) == (4, 60, 24, 6)
    assert "40% of them trained" in str(report) and "4 rows had no token to train" in str(report)


@pytest.mark.parametrize(
    ("what", "lengths"),
    [("truncate", [8, 5]), ("drop", [5]), ("chunk", [8, 8, 6, 5])],
)
def test_long_rows(what, lengths, tokenizer):
    rows = [tokens(20, 20), tokens(5, 5)]
    dataset, report = prepare(rows, tokenizer, PrepareOptions(max_length=8, long_rows=what))
    assert [len(ids) for ids in dataset["input_ids"]] == lengths
    assert (report.truncated, report.too_long) == {"truncate": (1, 0), "drop": (0, 1), "chunk": (0, 0)}[what]


def test_chunks_train_every_token_once(tokenizer):
    text = {"text": "abcdefghijklmnopqrstuvwxyz"}
    whole, _ = prepare([text], tokenizer, PrepareOptions(max_length=None))
    chunks, _ = prepare([text, text], tokenizer, PrepareOptions(max_length=8, long_rows="chunk"))
    predicted = [label for row in chunks["labels"][: len(chunks) // 2] for label in row[1:]]
    assert predicted == whole["labels"][0][1:]
    with pytest.raises(DataError, match="row 0 has 27 tokens"):
        prepare([text], tokenizer, PrepareOptions(max_length=8, long_rows="error"))


def test_packing_a_single_short_row(tokenizer):
    dataset, report = prepare([{"text": "ab"}], tokenizer, PrepareOptions(max_length=64, packing=True))
    assert dataset[0]["seq_lengths"] == [3] and report.batches_rows == 1
