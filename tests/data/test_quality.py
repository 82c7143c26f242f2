import pytest
from datasets import Dataset

from unsloth.core.errors import ConfigError, DataError
from unsloth.data import quality
from unsloth.data.encode import PrepareOptions

ROWS = [{"text": "a" * n} for n in range(1, 100)] + [{"text": "A "}, {"text": "b" * 500}]


def test_statistics_say_what_there_is(tokenizer):
    found = quality.statistics(ROWS, tokenizer, PrepareOptions(max_length=8, packing=True))
    assert (found.rows, found.shortest, found.longest, found.duplicates) == (101, 2, 501, 0)
    assert found.suggested_max_length == 128
    assert found.tokens == sum(len(row["text"]) + 1 for row in ROWS)


def test_duplicates_and_leaks_disregard_case_and_space():
    rows = [{"q": "One two"}, {"q": "one  TWO"}, {"q": "three"}]
    assert quality.unique(rows) == [0, 2]
    assert quality.leaks(rows[:1], [{"q": "x"}, {"q": "ONE two"}]) == [1]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_split_keeps_equal_rows_on_one_side(kind):
    rows = [{"text": f"row {i % 20}"} for i in range(60)]
    train, heldout = quality.split(kind(rows), heldout=0.25)
    assert len(train) + len(heldout) == 60 and len(heldout) == 15
    assert not quality.leaks(train, heldout)
    assert list(quality.split(kind(rows), heldout=0.25)[1]) == list(heldout)
    assert [row["text"] for row in train] != sorted(row["text"] for row in train)


def test_refusals():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        quality.split(ROWS, heldout=20)
    with pytest.raises(DataError, match="two different rows"):
        quality.split([{"a": 1}, {"a": 1}])
