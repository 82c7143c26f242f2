"""Configurations that mean the same give the same run: every step's loss, and the weights at the end.

A run is described by plain data (:data:`BASE`, with changes), in the sections of a run's file; ``run_in_process``
builds it through the public interface. Another way to start a run only has to return a ``Curve`` for the same data.
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

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only

STEPS = 10
BASE = {
    "model": {"max_seq_length": 256, "dtype": "float32", "load_in_16bit": True},
    "adapter": {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False},
    "data": {"responses_only": False},
    "training": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
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


def run_in_process(settings: Mapping[str, Any], folder: Path, rows: list[dict], output: Path) -> Curve:
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **settings["model"])
    model = FastLanguageModel.get_peft_model(model, **settings["adapter"])
    args = SFTConfig(output_dir=str(output), **settings["training"])
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)
    if settings["data"]["responses_only"]:
        trainer = train_on_responses_only(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Curve(torch.tensor(losses, dtype=torch.float64), weights)


@pytest.fixture(scope="module")
def curve(tiny, tmp_path_factory):
    """``curve(changes, family, tied)``: the run with these changes, made once."""
    rows = []
    for i in range(12):
        messages = [
            {"role": "user", "content": "Say " * (i % 4)},
            {"role": "assistant", "content": f"well {i} " * (1 + i % 3)},
        ]
        rows.append({"messages": messages})

    @cache
    def run(key: str, family: str, tied: bool) -> Curve:
        output = tmp_path_factory.mktemp("run")
        return run_in_process(merged(BASE, json.loads(key)), tiny(family, tied), rows, output)

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
    "packed": (WHOLE, {**WHOLE, "training.packing": True}),
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


@pytest.mark.parametrize(
    "changes",
    [{"training.seed": 6}, RESPONSES, {"training.learning_rate": 2.1e-3}, {"training.gradient_accumulation_steps": 2}],
    ids=str,
)
def test_another_run_is_told_apart(curve, changes):
    with pytest.raises(AssertionError, match="differ"):
        assert_same(curve(changes), curve({}))
