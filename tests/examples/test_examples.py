import subprocess
import sys
from pathlib import Path

import pytest

from unsloth.cli import main

ROOT = Path(__file__).parents[2]
LONG = {"grpo_code.py", "grpo_game.py"}  # the trainer is that of grpo_sums.py, tasks and games have tests of their own
EXAMPLES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.soak] if path.name in LONG else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.model
@pytest.mark.parametrize("script", EXAMPLES)
def test_the_example_runs(script, tmp_path, smollm2):
    result = subprocess.run(
        [sys.executable, str(script), "--smoke"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "->" in result.stdout
    assert len(script.read_text().splitlines()) < 110


@pytest.mark.model
def test_the_example_configuration_is_a_run(monkeypatch, capsys, smollm2):
    monkeypatch.chdir(ROOT)  # the data of the example is given by a path in the repository
    monkeypatch.setattr(sys, "argv", ["unsloth", "train", "examples/train.yaml", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "336 of up to" in shown and "held out" in shown and "42 of 8 x 1 rows" in shown
    assert "[[" in shown


def test_the_example_configuration_trains(monkeypatch, tmp_path, tiny):
    monkeypatch.chdir(ROOT)
    changes = [f"model.model_name={tiny()}", "training.max_steps=2", f"training.output_dir={tmp_path / 'out'}"]
    changes += ["data.rows=32", "data.eval_rows=8"]
    arguments = [argument for change in changes for argument in ("--set", change)]
    monkeypatch.setattr(sys, "argv", ["unsloth", "train", "examples/train.yaml", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter", "merged_16bit", "loss.png"}
