from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from unsloth.chat_templates import standardize_data_formats, standardize_sharegpt, to_sharegpt
from unsloth.core.errors import ConfigError, DataError

TITANIC = "[[The passenger embarked from {Embarked}.]] [[Their age is {Age}.]] [[Their fare is ${Fare}.]]"


def test_optional_parts_vanish_where_the_column_is_empty():
    rows = Dataset.from_dict(
        {"Embarked": ["S", "", None], "Age": [23.0, 18.0, float("nan")], "Fare": [None, 7.25, None], "y": [1, 0, 1]}
    )
    merged = to_sharegpt(rows, merged_prompt=TITANIC, output_column_name="y")
    said = [row["conversations"] for row in merged]
    assert [talk[0]["value"] for talk in said] == [
        "The passenger embarked from S. Their age is 23.",
        "Their age is 18. Their fare is $7.25.",
        "",
    ]
    assert said[0] == [
        {"from": "human", "value": "The passenger embarked from S. Their age is 23."},
        {"from": "gpt", "value": "1"},
    ]


def test_an_optional_part_may_hold_line_breaks_and_text_around_it_stays():
    rows = [{"instruction": "Add.", "input": "", "output": "x"}, {"instruction": "Add.", "input": "1", "output": "y"}]
    merged = to_sharegpt(rows, merged_prompt="{instruction}[[\nYour input is:\n{input}]]")
    assert [row["conversations"][0]["value"] for row in merged] == ["Add.", "Add.\nYour input is:\n1"]
    assert to_sharegpt(rows)[0]["conversations"][0]["value"] == "Add."


@pytest.mark.parametrize("turns", [2, 3, 7])
def test_rows_are_joined_at_random_each_equally_often(turns):
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(7)]
    joined = [row["conversations"] for row in to_sharegpt(rows, conversation_extension=turns)]
    assert all(len(talk) == 2 * turns for talk in joined) and len(joined) == 7
    asked = [[message["value"] for message in talk[::2]] for talk in joined]
    assert all(len(set(questions)) == turns for questions in asked)
    assert Counter(question for questions in asked for question in questions) == {f"q{i}": turns for i in range(7)}
    for talk in joined:
        assert all(a["value"] == q["value"].replace("q", "a") for q, a in zip(talk[::2], talk[1::2], strict=True))
    again = [row["conversations"] for row in to_sharegpt(rows, conversation_extension=turns)]
    other = [row["conversations"] for row in to_sharegpt(rows, conversation_extension=turns, random_state=1)]
    assert joined == again and joined != other


def test_to_sharegpt_refuses_with_the_columns_or_the_row():
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    with pytest.raises(ConfigError, match="question, answer"):
        to_sharegpt(rows, merged_prompt="{quest}", output_column_name="answer")
    with pytest.raises(DataError, match="row 1.*'answer' is empty"):
        to_sharegpt(rows, merged_prompt="{question}", output_column_name="answer")
    with pytest.raises(ConfigError, match="conversation_extension"):
        to_sharegpt(rows[:1], merged_prompt="{question}", output_column_name="answer", conversation_extension=3)


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_standardizing_gives_roles_and_contents(column):
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "h"},
        {"from": "gpt", "value": "g"},
    ]
    rows = Dataset.from_list([{column: talk, "id": 5}])
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "g"},
    ]
    assert standardize_sharegpt(rows)[0] == {column: expected, "id": 5}
    assert standardize_data_formats(IterableDataset.from_generator(lambda: iter(rows))) is not None
    stream = IterableDataset.from_generator(lambda: iter([{column: talk}]))
    assert next(iter(standardize_sharegpt(stream))) == {column: expected}


def test_rows_in_the_common_spelling_keep_all_their_keys():
    talk = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "thinking": "t", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "r", "name": "f"},
    ]
    standard = standardize_sharegpt([{"messages": talk}])[0]["messages"]
    assert [{k: v for k, v in message.items() if v is not None} for message in standard] == talk


def test_names_of_roles_can_be_added():
    rows = [{"conversations": [{"from": "Kunde", "value": "h"}, {"from": "Berater", "value": "g"}]}]
    found = standardize_sharegpt(rows, aliases_for_user=["Kunde"], aliases_for_assistant=["Berater"])
    assert [message["role"] for message in found[0]["conversations"]] == ["user", "assistant"]
    with pytest.raises(DataError, match="row 0, message 0: unknown role: got 'Kunde'"):
        standardize_sharegpt(rows)


def test_columns_become_conversations():
    alpaca = [{"instruction": "i", "input": "x", "output": "o"}]
    assert standardize_sharegpt(alpaca)[0]["conversations"] == [
        {"role": "user", "content": "i\n\nx"},
        {"role": "assistant", "content": "o"},
    ]
    pairs = [{"prompt": "p", "completion": "c"}]
    assert [m["content"] for m in standardize_sharegpt(pairs)[0]["conversations"]] == ["p", "c"]
    with pytest.raises(DataError, match="to_sharegpt"):
        standardize_sharegpt([{"text": "t"}])
