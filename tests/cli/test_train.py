import io
import json
import os
import re
import sys

import pytest
import yaml
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from rich.console import Console
from transformers import AutoModelForCausalLM

from unsloth.cli import main, run_config, train
from unsloth.core.errors import ConfigError, DataError
from unsloth.layers import fused_head
from unsloth.layers.fast import is_swapped
from unsloth.train.sft import SFTTrainer


@pytest.fixture
def run_file(tiny, tmp_path, conversations, monkeypatch):
    """Writes a file for a short run on a tiny model, changed by dotted keys; returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    content = {
        "model": {"model_name": str(tiny()), "max_seq_length": 128, "load_in_16bit": True, "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"path": "rows.jsonl", "responses_only": True},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"},
    }

    def write(**sections):
        changed = {name: {**content.get(name, {}), **values} for name, values in {**content, **sections}.items()}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
        return str(tmp_path / "run.yaml")

    return write


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["unsloth", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code


def test_a_run_trains_and_saves_what_the_file_asks_for(run_file, tiny, tmp_path, monkeypatch, capsys):
    file = run_file(
        save={"methods": ["lora", "merged_16bit"]}, data={"eval_rows": 4}, training={"eval_strategy": "steps"}
    )
    assert command(monkeypatch, "train", file, "--set", "training.eval_steps=1") == 0
    shown = capsys.readouterr().out
    assert "16 of up to" in shown and "4 rows" in shown  # 20 rows, 4 of them held out
    assert "held-out loss" in shown and "outputs/adapter" in shown
    assert "\x1b" not in shown
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "outputs/adapter")
    AutoModelForCausalLM.from_pretrained(tmp_path / "outputs/merged_16bit")
    assert (tmp_path / "outputs/loss.png").stat().st_size > 1000


def test_a_dry_run_shows_the_run_and_writes_nothing(run_file, tmp_path, monkeypatch, capsys):
    file = run_file()
    monkeypatch.setattr("unsloth.api.FastLanguageModel.from_pretrained", None)  # no weights are loaded
    before = sorted(os.listdir(tmp_path))
    assert command(monkeypatch, "train", file, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == before
    assert "2 of 2 x 1 rows" in shown and "activations" in shown
    assert "Plan for LlamaForCausalLM (family llama" in shown and "gate_proj, up_proj, down_proj together" in shown
    # The answer and the end of its turn are trained, the question is not.
    assert "<|im_start|>user↵\nSay·well:·0<|im_end|>↵\n<|im_start|>assistant↵\n[[well·0<|im_end|>↵\n]]" in shown


def test_a_refused_run_leaves_no_folder(run_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text('{"unknown": 1}\n')
    file = run_file()
    before = sorted(os.listdir(tmp_path))
    assert command(monkeypatch, "train", file, "--set", "training.output_dir=new/results") != 0
    assert "unknown" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_fast_paths_can_be_switched_off(run_file, monkeypatch, capsys):
    file = run_file(model={"fast_layers": False, "fused_head": False}, save={"plot": False})
    swapped = {}
    trained = SFTTrainer.train

    def look(trainer, **arguments):
        inner = trainer.model.get_base_model()
        swapped.update(layers=is_swapped(inner.model.layers[0]), head=fused_head.find(inner) is not None)
        return trained(trainer, **arguments)

    monkeypatch.setattr(SFTTrainer, "train", look)
    for last, expected in (("--dry-run", {}), ("--resume", {"layers": False, "head": False})):
        assert command(monkeypatch, "train", file, last) == 0
        shown = capsys.readouterr().out
        assert "No plan (model.fast_layers is false)" in shown and "Plan for" not in shown
        assert swapped == expected
    assert command(monkeypatch, "train", run_file(save={"plot": False})) == 0
    assert swapped == {"layers": True, "head": True} and "Plan for" in capsys.readouterr().out


def test_trained_tokens_are_green_where_there_are_colors(run_file):
    run = train.prepare_run(run_config.read(run_file()))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    console.print(train.first_row(console, run))
    shown = console.file.getvalue()
    assert "\x1b[32m" in shown and "[[" not in shown


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": -1, "num_train_epochs": 1, "packing": True, "per_device_train_batch_size": 1},
    ],
)
def test_the_number_of_steps_is_the_trainers(run_file, monkeypatch, training, capsys):
    file = run_file(training=training, save={"plot": False})
    foreseen = train.prepare_run(run_config.read(file)).steps
    assert command(monkeypatch, "train", file) == 0
    shown = capsys.readouterr().out
    assert f"{foreseen} of" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["steps"]] == [str(foreseen)] * 2


def test_full_finetuning_and_a_saved_adapter(run_file, monkeypatch, tmp_path, capsys):
    file = run_file(model={"load_in_16bit": False, "full_finetuning": True}, training={"output_dir": "full"})
    assert command(monkeypatch, "train", file, "--set", "adapter=null") == 2  # not a key of a section
    assert command(monkeypatch, "train", file) == 0
    assert (tmp_path / "full/merged_16bit/model.safetensors").is_file()
    assert command(monkeypatch, "train", run_file()) == 0
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    content["model"]["model_name"] = "outputs/adapter"
    del content["adapter"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert command(monkeypatch, "train", str(tmp_path / "again.yaml"), "--dry-run") == 0
    assert "rank 4" in capsys.readouterr().out


def write_rows(folder, rows):
    data = Dataset.from_list(rows)
    data.to_csv(folder / "a.csv", index=False)
    data.to_csv(folder / "a.tsv", index=False, sep="\t")
    data.to_parquet(folder / "a.parquet")
    data.to_json(folder / "a.json", lines=False)
    data.save_to_disk(folder / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder / "splits")
    (folder / "a.data").write_text((folder / "a.csv").read_text())


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.json", "saved", "splits", "a.data"])
def test_rows_of_every_kind_of_file(tmp_path, name):
    rows = [{"text": f"one {i}"} for i in range(5)]
    write_rows(tmp_path, rows)
    kind = "csv" if name == "a.data" else None
    data = run_config.DataOptions(path=str(tmp_path / name), rows=3, format=kind)
    assert [dict(row) for row in train.read_rows(data, data.path, "train")] == rows[:3]


def test_files_that_cannot_be_read(tmp_path):
    write_rows(tmp_path, [{"text": "a"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')

    def read(name):
        data = run_config.DataOptions(path=str(tmp_path / name))
        return train.read_rows(data, data.path, "train")

    with pytest.raises(ConfigError, match="Did you mean .*a.csv"):
        read("b.csv")
    with pytest.raises(DataError, match=r"files of this kind cannot be read.*\.csv"):
        read("a.data")
    with pytest.raises(DataError, match="the file is empty"):
        read("empty.jsonl")
    with pytest.raises(DataError, match="broken.jsonl, line 2"):
        list(read("broken.jsonl"))


@pytest.mark.parametrize(("section", "kept"), [("model", True), ("adapter", True), (None, False)])
def test_the_memory_policy_of_either_section_holds(run_file, monkeypatch, section, kept):
    changes = {} if section is None else {section: {"use_gradient_checkpointing": False}}
    config = run_config.read(run_file(**changes))
    asked = {}

    def get_peft_model(model, **arguments):
        asked.update(arguments)
        raise InterruptedError

    run = train.prepare_run(config)
    monkeypatch.setattr("unsloth.api.FastLanguageModel.get_peft_model", get_peft_model)
    with pytest.raises(InterruptedError):
        train.train(config)
    assert asked.get("use_gradient_checkpointing", "unsloth") == run.adapter.use_gradient_checkpointing
    assert run.adapter.use_gradient_checkpointing == (False if kept else "unsloth")


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo", "reward"])
def test_preferences_from_a_file(run_file, tmp_path, monkeypatch, capsys, method):
    rows = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no, never {i}"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run_file(
        data={"path": "pairs.jsonl", "eval_rows": 2, "responses_only": False},
        training={"method": method, "eval_strategy": "steps", "eval_steps": 1},
    )
    assert command(monkeypatch, "train", file, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.search(rf"method +{method}\b", shown)
    assert "[[·yes·0<|im_end|>" in shown and ("[[·no,·never·0<|im_end|>" in shown) == (method != "kto")
    assert command(monkeypatch, "train", file) == 0
    assert "held-out loss" in capsys.readouterr().out
    kind = AutoPeftModelForSequenceClassification if method == "reward" else AutoPeftModelForCausalLM
    kind.from_pretrained(tmp_path / "outputs/adapter", **({"num_labels": 1} if method == "reward" else {}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"training": {"method": "dpo", "packing": True, "dataset_text_field": "t"}},
            "dataset_text_field is not a key",
        ),
        ({"training": {"method": "orpo", "cpo_alpha": 0.5}}, "training.method: cpo or simpo"),
        ({"training": {"method": "ppo"}}, "must be one of sft, dpo, grpo, kto, reward, orpo, cpo, simpo"),
        ({"training": {"method": "dpo", "beta": "high"}}, "must be a number"),
        ({"training": {"beta": 0.1}}, "belongs to training.method: dpo or grpo or kto or orpo or cpo or simpo"),
        ({"training": {"method": "dpo"}}, "data.responses_only has no meaning with training.method dpo"),
    ],
)
def test_keys_belong_to_the_method(run_file, monkeypatch, capsys, sections, said):
    assert command(monkeypatch, "train", run_file(**sections), "--dry-run") == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_completions_rated_by_functions_that_the_file_names(run_file, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1 ="}], "answer": str(i + 1)} for i in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text("def short(completions, **columns):\n    return [-1.0 for _ in completions]\n")
    training = {
        "method": "grpo",
        "reward_functions": ["correctness", {"name": "length", "maximum": 20}, "own.py:short"],
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    file = run_file(data={"path": "sums.jsonl", "responses_only": False, "eval_rows": 2}, training=training)
    assert command(monkeypatch, "train", file, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"method +grpo\b", shown) and "8 prompts" in shown and re.search(r"steps +8 of 2 x 1", shown)
    assert command(monkeypatch, "train", file) == 0
    shown = capsys.readouterr().out
    assert "reward, first and last" in shown and re.search(r"steps +8\b", shown)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "outputs/adapter")


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        (None, "names no reward functions"),
        (["corectness"], "Did you mean correctness?"),
        (["contains"], "the reward contains cannot be made: missing a required argument: 'column'"),
        (["missing.py:f"], "no such file with reward functions"),
        (["json:nothing"], "json must define nothing"),
    ],
)
def test_reward_functions_that_are_not_there(run_file, tmp_path, monkeypatch, capsys, functions, said):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    training = {"method": "grpo", "num_generations": 2, "reward_functions": functions}
    file = run_file(data={"path": "sums.jsonl", "responses_only": False}, training=training)
    assert command(monkeypatch, "train", file, "--dry-run") == 2
    assert said in " ".join(capsys.readouterr().err.split())
