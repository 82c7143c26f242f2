"""Configurations that mean the same give the same run: every step's loss, and the weights at the end.

A run is plain data (:data:`BASE`, with changes) in the sections of a run's file. It is written as YAML and carried out
by ``unsloth train``, whose checkpoint of the last step holds losses and weights; ``run_in_process`` does the same
through the Python interface.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from unsloth.cli import main
from unsloth.train.estimate import MemoryEstimate

STEPS = 6
BASE = {
    "model": {"max_seq_length": 256, "dtype": "float32", "load_in_16bit": True},
    "adapter": {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False},
    "data": {"responses_only": False},
    "training": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": STEPS,
        "optim": "adamw_torch",
        "seed": 5,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


@dataclass(frozen=True)
class Curve:
    losses: torch.Tensor
    weights: dict[str, torch.Tensor]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``{"section.key": value}`` changed."""
    settings = {section: dict(values) for section, values in base.items()}
    for name, value in changes.items():
        section, key = name.split(".")
        settings[section][key] = value
    return settings


def run_from_a_file(settings: Mapping[str, Any], folder: Path, rows: list[dict], output: Path) -> Curve:
    """As a user runs it: a file, a command, a folder of results."""
    (output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        **settings,
        "model": {"model_name": str(folder), **settings["model"]},
        "data": {"path": str(output / "rows.jsonl"), **settings["data"]},
        "training": {"output_dir": str(output / "run"), **settings["training"]},
        "save": {"plot": False},
    }
    (output / "run.yaml").write_text(yaml.safe_dump(sections))
    ended = CliRunner().invoke(main.app, ["train", str(output / "run.yaml")], catch_exceptions=False)
    assert ended.exit_code == 0
    return curve_in(output / "run" / f"checkpoint-{STEPS}")


def run_in_process(settings: Mapping[str, Any], folder: Path, rows: list[dict], output: Path) -> Curve:
    """The same through the Python interface."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **settings["model"])
    model = FastLanguageModel.get_peft_model(model, **settings["adapter"])
    args = SFTConfig(output_dir=str(output), **settings["training"])
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    if settings["data"]["responses_only"]:
        trainer = train_on_responses_only(trainer)
    trainer.train()
    return curve_in(output / f"checkpoint-{STEPS}")


def curve_in(checkpoint: Path) -> Curve:
    """Losses and trained weights of a run, as its last checkpoint has them."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    (weights,) = [*checkpoint.glob("adapter_model.safetensors"), *checkpoint.glob("model.safetensors")]
    return Curve(torch.tensor(losses, dtype=torch.float64), load_file(weights))


@pytest.fixture(scope="module")
def rows():
    made = []
    for i in range(12):
        messages = [
            {"role": "user", "content": "Say " * (i % 4)},
            {"role": "assistant", "content": f"well {i} " * (1 + i % 3)},
        ]
        made.append({"messages": messages})
    return made


@pytest.fixture(scope="module")
def curve(tiny, rows, tmp_path_factory):
    """``curve(changes, family, tied)``: the run with these changes, made once, without the memory estimate before it.

    The estimate takes longer than such a run; tests/train/test_estimate.py has it, and so has the one run below that
    is compared with the Python interface.
    """
    memory = MemoryEstimate(*[1] * len(MemoryEstimate.__dataclass_fields__))

    @cache
    def run(key: str, family: str, tied: bool) -> Curve:
        settings, output = merged(BASE, json.loads(key)), tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unsloth.train.estimate.estimate", lambda *args, **kwargs: memory)
            return run_from_a_file(settings, tiny(family, tied), rows, output)

    return lambda changes, family="llama", tied=True: run(json.dumps(changes, sort_keys=True), family, tied)


def assert_same(found: Curve, expected: Curve, loss: float = 2e-6, weight: float = 1e-4) -> None:
    """Relative bounds of each loss, and of the norm of each weight's difference; 0 for the same bits.

    Adam divides a gradient by its own size, so a rounding error in an entry without a gradient to speak of may move
    that entry by a visible part of a step.
    """
    assert len(found.losses) == len(expected.losses) == STEPS
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    difference = ((found.losses - expected.losses).abs() / expected.losses).max().item()
    assert difference <= loss, f"losses differ by {difference:.1e}"
    assert found.weights.keys() == expected.weights.keys() and found.weights
    apart = {name: ((found.weights[name] - w).norm() / w.norm()).item() for name, w in expected.weights.items()}
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] <= weight, f"{worst} differs by {apart[worst]:.1e}"


RESPONSES = {"data.responses_only": True}
FUSED = {"training.fused_head": True}
FULL = {"model.load_in_16bit": False, "model.full_finetuning": True}
QLORA = {"model.load_in_16bit": None, "model.load_in_4bit": True}
WHOLE = {"training.per_device_train_batch_size": 12}  # every step sees all rows, in whatever order
SAME = {
    "padding-free": ({}, {"training.padding_free": True}),
    "padding-free, responses only": (RESPONSES, {**RESPONSES, "training.padding_free": True}),
    "packed, responses only": ({**WHOLE, **RESPONSES}, {**WHOLE, **RESPONSES, "training.packing": True}),
    "packed, fused head, checkpointing": (
        WHOLE,
        {**WHOLE, **FUSED, "training.packing": True, "adapter.use_gradient_checkpointing": "unsloth"},
    ),
    "accumulation": ({}, {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}),
    "accumulation of single rows, responses only": (
        RESPONSES,
        {**RESPONSES, "training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 4},
    ),
    "micro-batches computed together": (
        RESPONSES,
        {
            **RESPONSES,
            "training.padding_free": True,
            "training.join_batches": True,
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": 4,
        },
    ),
    "fused head": ({}, FUSED),
    "fused head, responses only": (RESPONSES, {**RESPONSES, **FUSED}),
    "fused head of TRL": ({}, {**FUSED, "model.fused_head": False}),
    "fused head, full training": (FULL, {**FULL, **FUSED}),
    "transformers' own layers": ({}, {"model.fast_layers": False}),
    "transformers' own layers and head, packed": (
        {**WHOLE, "model.fast_layers": False, "model.fused_head": False},
        {**WHOLE, **FUSED, "training.packing": True},
    ),
    "multiple of eight": ({}, {"training.pad_to_multiple_of": 8}),
    "4 bits, padding-free, fused": (QLORA, {**QLORA, **FUSED, "training.padding_free": True}),
}
EQUAL_BITS = {
    "checkpointing": {"adapter.use_gradient_checkpointing": "unsloth"},
    "two workers": {"training.dataloader_num_workers": 2},
    "no fused head": {"model.fused_head": False},
    "logits returned": {"training.return_logits": True, **FUSED},
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_the_same_run(curve, one, other):
    assert_same(curve(other), curve(one))


def test_the_same_run_of_another_family(curve):
    changes = {**WHOLE, **FUSED, "training.packing": True}
    assert_same(curve(changes, "qwen3", False), curve(WHOLE, "qwen3", False))


@pytest.mark.parametrize("changes", EQUAL_BITS.values(), ids=EQUAL_BITS)
def test_the_same_bits(curve, changes):
    assert_same(curve(changes), curve({}), loss=0, weight=0)


@pytest.mark.parametrize("changes", [{}, {**RESPONSES, **FUSED, "training.packing": True}], ids=str)
def test_the_command_line_runs_what_the_python_interface_runs(tiny, rows, tmp_path, changes):
    settings = merged(BASE, changes)
    (tmp_path / "file").mkdir()
    ours = run_from_a_file(settings, tiny(), rows, tmp_path / "file")
    assert_same(ours, run_in_process(settings, tiny(), rows, tmp_path / "python"), loss=0, weight=0)


@pytest.mark.parametrize(
    "changes",
    [RESPONSES, {"training.learning_rate": 4.1e-3}, {"training.gradient_accumulation_steps": 2}],
    ids=str,
)
def test_another_run_is_told_apart(curve, changes):
    with pytest.raises(AssertionError, match="differ"):
        assert_same(curve(changes), curve({}))
