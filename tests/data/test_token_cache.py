"""A prepared data set is found again by content, and by nothing else."""

from __future__ import annotations

import copy
import json

import pytest

from unsloth.data import prepare as preparing
from unsloth.data import token_cache
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare

ROWS = [{"text": f"row {n}"} for n in range(30)]
OPTIONS = PrepareOptions(max_length=32, cache=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def works(monkeypatch):
    """How often rows were encoded."""
    done = []
    real = preparing.encoded

    def encoded(*arguments):
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(preparing, "encoded", encoded)
    return done


def test_the_same_rows_in_another_file_are_found(tokenizer, works, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    first, said = prepare(tmp_path / "a.jsonl", tokenizer, OPTIONS)
    again, said_again = prepare(tmp_path / "b.jsonl", copy.deepcopy(tokenizer), OPTIONS)
    assert len(works) == 1
    assert again[:] == first[:]
    assert said_again == said


@pytest.mark.parametrize("packing", [False, True])
def test_lists_too_and_packed_rows(tokenizer, works, packing):
    options = PrepareOptions(max_length=32, cache=True, packing=packing)
    first, _ = prepare(ROWS, tokenizer, options)
    again, _ = prepare([dict(row) for row in ROWS], tokenizer, options)
    assert len(works) == 1
    assert again[:] == first[:]


def test_what_makes_a_difference_to_tokens_makes_one_here(tokenizer, works):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["row"])
    template = copy.deepcopy(tokenizer)
    template.chat_template += " "
    cases = [
        (ROWS, tokenizer, OPTIONS),
        (ROWS[::-1], tokenizer, OPTIONS),
        (ROWS, other, OPTIONS),
        (ROWS, template, OPTIONS),
        (ROWS, tokenizer, PrepareOptions(max_length=5, cache=True)),
        (ROWS, tokenizer, PrepareOptions(max_length=32, cache=True, append_eos=False)),
    ]
    for case in cases:
        prepare(*case)
    assert len(works) == len(cases)
    prepare(ROWS, tokenizer, PrepareOptions(max_length=32, cache=True, num_proc=2))
    assert len(works) == len(cases)


def test_rows_whose_content_cannot_be_told_are_not_kept(tokenizer, works, folder):
    for _ in range(2):
        prepare([{"text": "a", "more": object()}] * 3, tokenizer, OPTIONS)
        prepare(ROWS, tokenizer, PrepareOptions(max_length=32, cache=True, formatting=lambda row: row["text"]))
    assert len(works) == 4
    assert not folder.exists()


def test_a_damaged_one_is_made_anew(tokenizer, works, folder, caplog):
    first, _ = prepare(ROWS, tokenizer, OPTIONS)
    file = next(folder.glob("*/tokens.arrow"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    expected = first[:]
    file.unlink()
    file.write_bytes(data)
    again, _ = prepare(ROWS, tokenizer, OPTIONS)
    assert len(works) == 2
    assert again[:] == expected
    assert prepare(ROWS, tokenizer, OPTIONS)[0][:] == expected
    assert len(works) == 2


def test_only_the_newest_are_kept(tokenizer, folder):
    for n in range(token_cache._KEPT + 3):
        prepare([{"text": f"{n}"}], tokenizer, OPTIONS)
    assert len(list(folder.iterdir())) == token_cache._KEPT
