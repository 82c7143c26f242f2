"""Rows of every layout become conversations."""

from __future__ import annotations

import pytest

from unsloth.core.errors import DataError
from unsloth.data import formats
from unsloth.data.row_types import answer_of, conversations_of

TURNS = [{"role": "user", "content": "q"}]
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


def said(row, layout=None):
    detection = formats.detect(list(row), layout=layout)
    found = conversations_of(row, 3, detection)
    return detection.layout, {
        name: [(m["role"], m["content"]) for m in conversation.messages] for name, conversation in found.items()
    }


Q, YES, NO = ("user", "q"), ("assistant", "yes"), ("assistant", "no")


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        ({"messages": [*TURNS, GOOD]}, "conversation", {"conversation": [Q, YES]}),
        ({"instruction": "q", "output": "yes"}, "alpaca", {"conversation": [Q, YES]}),
        ({"prompt": "q", "completion": "yes"}, "completion", {"conversation": [Q, YES]}),
        ({"prompt": TURNS, "completion": [GOOD]}, "completion", {"conversation": [Q, YES]}),
        (
            {"prompt": "q", "chosen": "yes", "rejected": "no"},
            "preference",
            {"chosen": [Q, YES], "rejected": [Q, NO]},
        ),
        (
            {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
            "preference",
            {"chosen": [Q, YES], "rejected": [Q, NO]},
        ),
        (
            {"prompt": "q", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD], "score": 1},
            "preference",
            {"chosen": [Q, YES], "rejected": [Q, NO]},
        ),
        ({"prompt": "q", "completion": "yes", "label": True}, "unpaired", {"good": [Q, YES]}),
        ({"prompt": TURNS, "completion": [BAD], "label": 0}, "unpaired", {"bad": [Q, NO]}),
        ({"completion": [*TURNS, BAD], "label": False}, "unpaired", {"bad": [Q, NO]}),
        ({"prompt": "q", "response": "no", "label": False}, "unpaired", {"bad": [Q, NO]}),
        ({"prompt": TURNS}, "prompt", {"prompt": [Q]}),
        ({"question": "q", "answer": "#### 7"}, "prompt", {"prompt": [Q]}),
        ({"problem": "q", "solution": "7", "system": "s"}, "prompt", {"prompt": [("system", "s"), Q]}),
    ],
)
def test_layouts(row, layout, expected):
    assert said(row) == (layout, expected)


def test_answers_to_compare_with():
    row = {"problem": "q", "solution": 7}
    assert answer_of(row, formats.detect(list(row))) == "7"
    assert answer_of({"problem": "q", "solution": float("nan")}, formats.detect(list(row))) is None
    assert answer_of({"prompt": "q"}, formats.detect(["prompt"])) is None


def test_the_reason_is_said_and_can_be_overridden():
    row = {"prompt": "q", "completion": "yes", "label": True}
    assert formats.detect(list(row)).reason == "the columns 'prompt', 'completion' and 'label'"
    assert said(row, "completion") == ("completion", {"conversation": [Q, YES]})
    with pytest.raises(DataError, match="do not have the columns of the layout 'preference'"):
        formats.detect(list(row), layout="preference")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completion": "yes", "label": "good"}, "row 3: 'label' must be true or false"),
        ({"question": float("nan"), "answer": "7"}, "row 3: column 'question' must hold a question"),
        ({"prompt": "q", "chosen": "", "rejected": "no"}, "row 3: 'chosen' is empty"),
        ({"text": "x"}, "rows of the layout 'text' are not conversations"),
    ],
)
def test_refusals(row, message):
    with pytest.raises(DataError, match=message):
        said(row)
