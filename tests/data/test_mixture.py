import pytest

from unsloth.core.errors import ConfigError, DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.mixture import mix
from unsloth.data.prepare import prepare

CHAT = [{"conversations": [{"from": "human", "value": f"c{i}"}, {"from": "gpt", "value": "x"}]} for i in range(100)]
TASKS = [{"instruction": f"t{i}", "output": "y"} for i in range(90)]


def test_shares_are_kept_and_no_row_comes_twice(tokenizer):
    mixed = mix([TASKS, CHAT], [75, 25])
    assert mixed.counts() == [90, 30]
    asked = [row["messages"][0]["content"] for row in mixed]
    assert len(set(asked)) == 120 and {text[0] for text in asked[:20]} == {"c", "t"}
    assert asked == [row["messages"][0]["content"] for row in mix([TASKS, CHAT], [75, 25])]
    assert asked != [row["messages"][0]["content"] for row in mix([TASKS, CHAT], [75, 25], random_state=1)]
    dataset, report = prepare(mixed, tokenizer, PrepareOptions(max_length=64, train_on="responses"))
    assert report.rows == 120 and len(dataset) == 120
    assert mix([TASKS, CHAT], [0.5, 0.5], rows=20).counts() == [10, 10]


def test_refusals():
    with pytest.raises(ConfigError, match="positive weight"):
        mix([TASKS, CHAT], [1, 0])
    with pytest.raises(ConfigError, match="at most 120"):
        mix([TASKS, CHAT], [3, 1], rows=121)
    with pytest.raises(DataError, match="data set 1"):
        mix([TASKS, []], [1, 1])
    with pytest.raises(DataError, match="apply_chat_template"):
        mix([TASKS, [{"text": "t"}]], [1, 1])
    with pytest.raises(DataError, match="DPOTrainer"):
        mix([TASKS, [{"prompt": "p", "chosen": "c", "rejected": "r"}]], [1, 1])
