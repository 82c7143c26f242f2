"""Micro-batches that are computed together give the gradients of those that are computed one by one."""

from __future__ import annotations

import pytest
import torch

from unsloth.data.collate import Collator
from unsloth.train import joining


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([3, 4, 5, 9, 1], 12, [[0, 1, 2], [3, 4]]),
        ([3, 4, 5], 11, [[0, 1], [2]]),
        ([20, 1, 1], 10, [[0], [1, 2]]),
        ([5], 10, [[0]]),
        ([], 10, []),
    ],
)
def test_neighbours_are_joined_as_far_as_they_fit(lengths, most, expected):
    assert joining.groups(lengths, most) == expected


def rows(lengths, start):
    made = [list(range(start + i, start + i + length)) for i, length in enumerate(lengths)]
    return [{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in made]


def test_joined_batches_are_the_batch_of_all_rows():
    lengths = [[3, 1], [4], [2, 2, 5]]
    batches = [Collator(0)(rows(each, 10 * i)) for i, each in enumerate(lengths)]
    whole = Collator(0)([row for i, each in enumerate(lengths) for row in rows(each, 10 * i)])
    found = joining.join(batches)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert joining.can_join(batches)
    assert not joining.can_join([*batches, Collator(0)([{"input_ids": [1, 2], "labels": [1, 2]}])])


def test_each_batch_is_computed_once():
    batches = [Collator(0)(rows([length], 5)) for length in (6, 3, 9, 1)]
    joined = joining.Joined(batches, most=10)
    taken = [joined.take(batch) for batch in batches]
    assert taken[0] is None and taken[1]["input_ids"].shape == (1, 9)
    assert taken[2] is None and taken[3]["input_ids"].shape == (1, 10)
    alone = joining.Joined(batches, most=3)
    assert all(alone.take(batch) is batch for batch in batches)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, 256),
        (256, 256),
        (257, 512),
        (1100, 1280),
        (2047, 2048),
        (2049, 2304),
        (4097, 4608),
        (8192, 8192),
        (9000, 9000),
    ],
)
def test_lengths_are_rounded_up(tokens, expected):
    assert joining.rounded(tokens) == expected < tokens * 1.125 + 256


def test_what_a_pass_is_filled_with_is_rows_of_their_own():
    batches = [Collator(0)(rows([length], 5)) for length in (200, 50, 130)]
    joined = joining.Joined(batches, most=300, fills=True)
    assert joined.take(batches[0]) is None
    found = joined.take(batches[1])
    assert found["input_ids"].shape == (1, 256) and joined.filled == 6
    assert found["position_ids"][0, 249:].tolist() == [49, 0, 1, 2, 3, 4, 5] and found["labels"][0, 250:].eq(-100).all()
    found = joined.take(batches[2])
    assert joined.filled == 126 and torch.equal(found["position_ids"][0, 130:], torch.arange(126))
    assert joining.fill(joining.join([batches[0], batches[2]]))["position_ids"][0, -54:].tolist() == list(range(54))
