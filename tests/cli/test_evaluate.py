import json

import pytest

from unsloth.cli import evaluate
from unsloth.cli.evaluate import EvalOptions
from unsloth.core.errors import ConfigError


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return str(path)


def test_kld_prints_and_writes_its_figures(tiny, texts, tmp_path, capsys):
    options = EvalOptions(output=str(tmp_path / "out.json"))
    evaluate.divergence(str(tiny()), str(tiny("llama", tied=False)), texts, tokens=128, context=64, options=options)
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert written["tokens"] == 128 and written["mean"] > 0
    assert f"{written['mean']:.5f} nats" in printed and f"{written['flips']:.2%}" in printed


def test_mmlu_shows_the_first_of_each_subject_and_asks_the_others(tiny, tmp_path, capsys):
    rows = [
        {"question": f"{n}?", "choices": list("wxyz"), "answer": n % 4, "subject": subject}
        for subject in ("law", "art")
        for n in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvalOptions(output=str(tmp_path / "out.json"), batch_size=2)
    evaluate.questions(str(tiny()), str(tmp_path / "q.jsonl"), examples=None, shots=2, limit=None, options=options)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["questions"] == 8 and set(written["by_subject"]) == {"law", "art"}
    assert "8, after 2 examples each" in capsys.readouterr().out


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="--precision"):
        EvalOptions(precision="3bit")
    with pytest.raises(ConfigError, match="--tokenizer"):
        evaluate._tokenizer(EvalOptions(), None)
