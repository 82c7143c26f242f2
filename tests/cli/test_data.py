"""`unsloth data`, as a user sees it."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from unsloth.cli import data
from unsloth.core.errors import ConfigError, DataError
from unsloth.data.sources import load_rows


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def file(tmp_path):
    rows = [talk(f"question {n}", "answer " * n) for n in range(1, 11)] + [talk("question 1", "answer ")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def shown(colors=False, **options):
    console = Console(width=120, record=True, force_terminal=colors, color_system="standard" if colors else None)
    data.show(data.ShowOptions(**options), console)
    return console.export_text(styles=colors)


def test_rows_and_statistics(file, tiny):
    text = shown(source=str(file), model=str(tiny()), rows=2, responses_only=True, max_length=50)
    assert "Row 1," in text and "Row 2," not in text
    assert "<|im_start|>user\u21b5\nquestion\u00b71<|im_end|>" in text
    assert "[[answer\u00b7<|im_end|>" in text
    assert "conversation, because of the column 'messages'" in text
    assert "1 rows repeat an earlier one" in text
    assert "rows are longer than 50 tokens" in text
    assert "would hold 99% of the rows" in text


def test_trained_tokens_are_colored(file, tiny):
    text = shown(colors=True, source=str(file), model=str(tiny()), rows=1, responses_only=True)
    assert "\x1b[32manswer" in text
    assert "[[" not in text


def test_a_template_by_name(file, tiny):
    assert "<|start_header_id|>user" in shown(source=str(file), model=str(tiny()), template="llama-3.1", rows=1)


def test_rows_for_other_trainers_are_shown_too(tmp_path, tiny):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "[red]yes", "rejected": "no"}) + "\n")
    text = shown(source=str(tmp_path / "pairs.jsonl"))
    assert "Row 0, chosen" in text and "assistant: [red]yes" in text and "assistant: no" in text
    assert "DPOTrainer" in text


def test_a_row_that_cannot_be_used_is_named(tmp_path, tiny):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "wizard", "content": "x"}]}))
    with pytest.raises(DataError, match="row 0, message 0: unknown role.*wizard"):
        shown(source=str(tmp_path / "bad.jsonl"), model=str(tiny()))


def test_split_dedup_and_mix_write_what_can_be_read_again(file, tmp_path):
    data.deduplicate(str(file), str(tmp_path / "clean"))
    clean = load_rows(tmp_path / "clean")
    assert len(clean) == 10
    data.split(str(tmp_path / "clean"), str(tmp_path / "halves"), heldout=0.2, seed=1)
    train, held = (load_rows(tmp_path / "halves" / f"{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(held)) == (8, 2)
    assert sorted(map(json.dumps, [*train, *held])) == sorted(map(json.dumps, clean))
    sources = [f"{tmp_path}/halves/train.jsonl=75", f"{tmp_path}/halves/heldout.jsonl=25"]
    data.mix(sources, str(tmp_path / "mixed"), seed=1)
    assert len(load_rows(tmp_path / "mixed")) == 8
    with pytest.raises(ConfigError, match="each data set needs a weight.*got .*rows.jsonl"):
        data.mix([str(file)], str(tmp_path / "more"), seed=1)
    assert not (tmp_path / "more").exists()
