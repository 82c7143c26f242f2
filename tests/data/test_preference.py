import copy

import pytest
from datasets import Dataset, IterableDataset

from unsloth.core.errors import ConfigError, DataError, TokenizerError
from unsloth.data.preference import PreferenceOptions, pair_of, prepare_pairs, prepare_rated

USER = {"role": "user", "content": "Is it open?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}


def decoded(tokenizer, row):
    return {name: tokenizer.decode(ids) for name, ids in row.items() if name.endswith("_ids")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Is it open?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Is it open?", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {
            "chosen": [{"from": "human", "value": "Is it open?"}, {"from": "gpt", "value": "Yes."}],
            "rejected": [{"from": "human", "value": "Is it open?"}, {"from": "gpt", "value": "No."}],
        },
    ],
)
def test_messages_in_every_arrangement_mean_the_same(tokenizer, row):
    dataset, report = prepare_pairs([row], tokenizer, PreferenceOptions())
    assert decoded(tokenizer, dataset[0]) == {
        "prompt_ids": "<|im_start|>user\nIs it open?<|im_end|>\n<|im_start|>assistant\n",
        "chosen_ids": "Yes.<|im_end|>\n",
        "rejected_ids": "No.<|im_end|>\n",
    }
    assert str(report) == "1 of 1 rows"


def test_texts_end_with_the_end_of_text(tokenizer):
    rows = [{"prompt": "Open? ", "chosen": "Yes", "rejected": "No<|im_end|>"}]
    dataset, _ = prepare_pairs(rows, tokenizer, PreferenceOptions())
    expected = {"prompt_ids": "Open? ", "chosen_ids": "Yes<|im_end|>", "rejected_ids": "No<|im_end|>"}
    assert decoded(tokenizer, dataset[0]) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Human: open? Assistant: Yes", "Human: open? Assistant: No", ("Human: open? Assistant:", " Yes", " No")),
        ("Human: open?\nYes", "Human: open?\nYears ago", ("Human: open?\n", "Yes", "Years ago")),
        ("Is it open", "Is it open now", ("Is it", " open", " open now")),
    ],
)
def test_a_prompt_is_the_common_beginning_of_two_texts(chosen, rejected, expected):
    assert pair_of({"chosen": chosen, "rejected": rejected}, 0) == expected


def test_a_long_prompt_loses_its_beginning(tokenizer):
    rows = [{"prompt": "0123456789", "chosen": "abc", "rejected": "xyz"}]
    dataset, report = prepare_pairs(rows, tokenizer, PreferenceOptions(max_prompt_length=4))
    assert decoded(tokenizer, dataset[0])["prompt_ids"] == "6789"
    assert (report.prompts_cut, report.truncated) == (1, 0)
    assert "1 prompts were longer than max_prompt_length and lost their beginning" in str(report)


def test_long_rows_are_cut_where_they_should_be(tokenizer):
    rows = [{"prompt": "0123", "chosen": "abcdef", "rejected": "x"}]

    def cut(**options):
        dataset, report = prepare_pairs(rows, tokenizer, PreferenceOptions(**options))
        assert report.truncated == 1
        return tuple(decoded(tokenizer, dataset[0]).values())

    assert cut(max_length=7) == ("0123", "abc", "x<|im_end|>")
    assert cut(max_completion_length=2) == ("0123", "ab", "x<|im_end|>")
    assert cut(max_length=9, keep_end=True) == ("23", "abcdef<|im_end|>", "x<|im_end|>")


def test_pairs_without_a_preference_are_left_out_and_counted(tokenizer):
    rows = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "longer x", "rejected": "longer y"},
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "a prompt that fills it", "chosen": "yes", "rejected": "no"},
    ]
    dataset, report = prepare_pairs(rows, tokenizer, PreferenceOptions(max_length=8))
    assert len(dataset) == 1
    assert (report.rows, report.kept, report.identical, report.filled) == (4, 1, 2, 1)
    assert "2 pairs have the same answer on both sides and were left out" in str(report)
    with pytest.raises(DataError, match="no row is left to train on.*2 pairs have the same answer"):
        prepare_pairs(rows[:1] * 2, tokenizer, PreferenceOptions())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'.*'prompt', 'chosen'.*rename_column"),
        ([{"question": "a", "answer": "b"}], "no column 'chosen' or 'rejected'.*question"),
        ([{"prompt": "a", "completion": "b", "label": True}], "Rated answers are for KTOTrainer"),
        ([{"messages": [USER, YES]}], "Rows without a preference are for SFTTrainer"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": None}],
            "row 1: 'rejected' is empty.*filter",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "  "}], "row 0: 'rejected' is empty"),
        ([{"prompt": "a", "chosen": "", "rejected": "c"}], "row 0: 'chosen' is empty"),
        ([{"prompt": [USER], "chosen": [], "rejected": [NO]}], "row 0: 'chosen' is empty"),
        (
            [{"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}], "rejected": [NO]}],
            "row 0: 'chosen' holds no answer",
        ),
        ([{"prompt": [USER], "chosen": [USER], "rejected": [NO]}], "row 0: 'chosen' holds no answer"),
        ([{"chosen": [YES], "rejected": [NO]}], "row 0: chosen and rejected do not begin with the same message"),
        ([{"chosen": "Yes", "rejected": "No"}], "row 0: chosen and rejected do not begin with the same text"),
        (
            [{"prompt": "a", "chosen": 3, "rejected": "c"}],
            "row 0: 'chosen' is empty or no text, but must hold an answer",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "\ud800"}], "row 0: half of a surrogate pair"),
        (
            [{"prompt": [USER], "chosen": [YES], "rejected": [{**USER, "content": "No?"}]}],
            "row 0: 'rejected' ends with a message of the user",
        ),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}], "row 0: 'rejected_ids' must be token ids"),
        ([{"prompt_ids": [1], "chosen_ids": [-2], "rejected_ids": [3]}], "row 0: 'chosen_ids' must be token ids"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        prepare_pairs(rows, tokenizer, PreferenceOptions())


def test_rated_answers(tokenizer):
    rows = [
        {"prompt": [USER], "completion": [YES], "label": True},
        {"prompt": [USER], "completion": "No.", "label": 0},
        {"prompt": None, "completion": [USER, NO], "label": False},
    ]
    found = [prepare_rated([row], tokenizer, PreferenceOptions())[0][0] for row in rows]
    assert [row["label"] for row in found] == [True, False, False]
    assert [tokenizer.decode(row["completion_ids"]) for row in found] == [
        "Yes.<|im_end|>\n",
        "No.<|im_end|>\n",
        "No.<|im_end|>\n",
    ]
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"] == found[2]["prompt_ids"]


def test_pairs_are_taken_apart(tokenizer):
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
    ]
    dataset, report = prepare_rated(rows, tokenizer, PreferenceOptions())
    assert [tokenizer.decode(ids) for ids in dataset["completion_ids"]] == ["yes<|im_end|>", "no<|im_end|>"]
    assert dataset["label"][:] == [True, False]
    assert (report.rows, report.kept, report.identical) == (4, 2, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "no column 'label'"),
        ({"prompt": "a", "answer": "b"}, "no column 'chosen' or 'rejected'.*'completion'"),
        ({"prompt": "a", "completion": "b", "label": 2}, "row 0: 'label' must be true or false"),
        ({"prompt": "a", "completion": "b", "label": None}, "row 0: 'label' must be true or false"),
        ({"prompt": "a", "completion": "", "label": True}, "row 0: 'completion' is empty"),
        ({"completion": "b", "label": True}, "row 0: 'completion' has no prompt"),
    ],
)
def test_rated_rows_that_cannot_be_used_are_named(tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        prepare_rated([row], tokenizer, PreferenceOptions())


def test_prepared_and_streamed_rows(tokenizer):
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {"prompt": "a", "chosen": "b", "rejected": "b", "margin": 1.0},
    ]
    prepared, _ = prepare_pairs(rows, tokenizer, PreferenceOptions())
    assert prepared["margin"][:] == [0.5]
    again, report = prepare_pairs(prepared, tokenizer, PreferenceOptions())
    assert again is prepared and report is None
    streamed, report = prepare_pairs(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, PreferenceOptions())
    assert isinstance(streamed, IterableDataset) and report is None
    assert list(streamed) == list(prepared)


def test_messages_need_a_template_and_limits_must_make_sense(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TokenizerError, match="template"):
        prepare_pairs([{"prompt": [USER], "chosen": [YES], "rejected": [NO]}], bare, PreferenceOptions())
    with pytest.raises(ConfigError, match="max_prompt_length must be at least 1"):
        PreferenceOptions(max_prompt_length=0)
