"""C01: wrong input to the command line gives one clear screen, the nearest key, and exit code 2; Ctrl-C gives 130."""

import os
import signal
import subprocess
import sys
import time

import pytest

from unsloth.cli import main

MODEL = "model:\n  model_name: some/model\n"
TRAINING = f"{MODEL}training:\n  "

# What stands in the file, and what a beginner must read.
FILES = {
    "a typo in a key": (f"{TRAINING}lerning_rate: 1e-4\n", "line 4", "Did you mean learning_rate?"),
    "a typo in a section": (f"{MODEL}trainng:\n  max_steps: 1\n", "line 3", "Did you mean training?"),
    "a dash for an underscore": (f"{TRAINING}max-steps: 1\n", "line 4", "Did you mean max_steps?"),
    "a key in the wrong section": (f"{MODEL}  r: 16\n", "line 3", "It belongs under 'adapter:'."),
    "a key without a section": ("model_name: x\n", "line 1", "It belongs under 'model:'."),
    "a key like no other": (f"{MODEL}  zzz: 16\n", "line 3", "Known are: model_name"),
    "text for a number": (f"{TRAINING}learning_rate: fast\n", "line 4", "must be a number: got 'fast'"),
    "a fraction for a count": (f"{TRAINING}max_steps: 1.5\n", "line 4", "must be a whole number: got 1.5"),
    "a word for a switch": (f"{MODEL}  load_in_4bit: maybe\n", "line 3", "must be true or false: got 'maybe'"),
    "a list for a number": (f"{TRAINING}max_steps: [1]\n", "line 4", "must be a whole number: got [1]"),
    "a number for text": (f"{TRAINING}run_name: 7\n", "line 4", "Put it in quotes"),
    "an unknown file format": (
        f"{MODEL}data:\n  path: x\n  format: xml\n",
        "line 5",
        "json, jsonl, csv, tsv, xlsx, parquet",
    ),
    "a tab": (f"{MODEL}training:\n\tmax_steps: 1\n", "line 4", "Indent with spaces"),
    "an open bracket": (f"{TRAINING}max_steps: [1\n", "is not YAML", "brackets are closed"),
    "no space after the colon": (f"{TRAINING}max_steps:1\n", "line 3", "Put a space after each colon"),
    "the same key twice": (f"{MODEL}  model_name: y\n", "line 2", "again in line 3"),
    "a list of everything": ("- a\n- b\n", "must hold 'key: value' lines", "a list"),
    "nothing": ("", "is empty", "Start from examples/train.yaml"),
    "no model": ("data:\n  path: x\n", "does not name a model", "model_name: a folder or a hub id"),
    "no data": (MODEL, "has no section 'data'", "Add data:"),
    "data without a path": (f"{MODEL}data:\n  rows: 3\n", "has no path", "Add path:"),
    "two precisions": (f"{MODEL}  load_in_4bit: true\n  load_in_8bit: true\n", "only one precision", "Keep one"),
    "remote code from a file": (f"{MODEL}  trust_remote_code: true\n", "line 3", "--trust-remote-code"),
    "an object of Python": (f"{MODEL}  dtype: !!python/object:os.system x\n", "line 3", "write a plain value"),
    "an unknown way to save": (f"{MODEL}save:\n  methods: [zip]\n", "got 'zip'", "Use lora or merged_16bit"),
    "an unknown optimizer": (f"{TRAINING}optim: adamw_8bits\ndata:\n  path: x\n", "training.optim", "adamw_8bit?"),
    "a rank of zero": (f"{MODEL}adapter:\n  r: 0\n", "rank r must be a positive", "Common: 8, 16"),
}

# Arguments, and what a beginner must read. {file} is a sound file.
CALLS = {
    "an unknown flag": (["train", "{file}", "--dryrun"], "No such option", "--dry-run"),
    "an unknown command": (["trian", "{file}"], "No such command 'trian'", "Did you mean 'train'?"),
    "no file": (["train"], "Missing argument 'CONFIG.yaml'", "--help"),
    "a missing file": (["train", "{file}l"], "no such configuration file", "Did you mean"),
    "a folder": (["train", "."], "must be a file", "folder"),
    "a file of data": (["train", "rows.jsonl"], "a file of data", "path: in the section 'data'"),
    "a change without a section": (["train", "{file}", "--set", "max_steps=3"], "got 'max_steps=3'", "training.max_"),
    "a change without a value": (["train", "{file}", "--set", "training.max_steps"], "needs", "--set training.max_ste"),
    "a change of an unknown key": (["train", "{file}", "--set", "training.max_step=3"], "unknown", "mean max_steps?"),
    "a change of the wrong type": (["train", "{file}", "--set", "training.max_steps=x"], "whole number", "got 'x'"),
    "a change that is not YAML": (["train", "{file}", "--set", "training.optim=["], "not YAML", "in quotes"),
    "a missing data file": (["train", "{file}", "--set", "data.path=./row.jsonl"], "no such data file", "rows.jsonl?"),
    "no size": (["estimate", "{file}", "--memory", "lots"], "--memory needs a size", "Such as 24GB"),
    "an unknown export": (["export", "a", "b", "--method", "zip"], "unknown --method", "lora, merged_16bit"),
    "a count below one": (["chat", "x", "--max-tokens", "0"], "'--max-tokens'", "1"),
}


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["unsloth", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code, capsys.readouterr().err


def check_screen(error):
    assert "Traceback" not in error
    assert len(error) < 1200 and len(error.splitlines()) <= 8


@pytest.mark.parametrize("case", FILES)
def test_C01_a_wrong_file(case, tmp_path, monkeypatch, capsys):
    text, *expected = FILES[case]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    name = "estimate" if case == "a rank of zero" else "train"
    code, error = call(monkeypatch, capsys, name, str(file))
    check_screen(error)
    for part in expected:
        assert part in error
    assert code == 2


@pytest.mark.parametrize("case", CALLS)
def test_C01_a_wrong_call(case, tiny, tmp_path, monkeypatch, capsys):
    arguments, *expected = CALLS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  model_name: {tiny()}\ndata:\n  path: rows.jsonl\n")
    code, error = call(monkeypatch, capsys, *(argument.format(file=file) for argument in arguments))
    check_screen(error)
    for part in expected:
        assert part in error
    assert code == 2


def test_C01_a_failure_is_1_and_debug_shows_where(tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  model_name: ./nothing\n")
    code, error = call(monkeypatch, capsys, "estimate", str(file))
    check_screen(error)
    assert code == 1 and "no such model folder" in error
    code, error = call(monkeypatch, capsys, "estimate", str(file), "--debug")
    assert code == 1 and "Traceback" in error and "no such model folder" in error


def test_C01_an_unforeseen_error_says_how_to_look_closer(monkeypatch, capsys):
    def break_down():
        raise ZeroDivisionError("by zero\nat length")

    monkeypatch.setattr("unsloth.cli.models.models", break_down)
    code, error = call(monkeypatch, capsys, "models")
    check_screen(error)
    assert code == 1 and "ZeroDivisionError: by zero" in error and "--debug" in error


def test_C01_mistakes_and_help_do_not_wait_for_torch(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{TRAINING}lerning_rate: 1\n")
    for arguments, expected in ((["--help"], 0), (["train", "--help"], 0), (["train", str(file)], 2)):
        code = (
            f"import sys; sys.argv = ['unsloth', *{arguments!r}]\n"
            "from unsloth.cli.main import main\n"
            "try: main()\n"
            "except SystemExit as ended: print(ended.code, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.stdout.splitlines()[-1] == f"{expected} []", result.stderr
        assert "\x1b" not in result.stdout + result.stderr


def test_C01_interrupting_ends_with_130(tiny):
    process = subprocess.Popen(
        [sys.executable, "-m", "unsloth.cli.main", "chat", str(tiny())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("/reset\n")  # answered as soon as the model is loaded
        process.stdin.flush()
        assert "forgotten" in process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted." in error and "Traceback" not in error
