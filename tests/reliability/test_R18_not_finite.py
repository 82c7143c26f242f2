"""Steps on gradients that are not finite are not taken; broken weights are never saved."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from unsloth.core.errors import TrainingError
from unsloth.train import discovery


class Poison(TrainerCallback):
    """Breaks something of the model before a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.what(model)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def poison_one_tensor(model):
    trained(model)[3].data[0, 0] = float("nan")


def poison_the_base(model):
    next(p for p in model.parameters() if not p.requires_grad).data[:] = float("nan")


def with_broken_losses(trainer, steps, value):
    """Multiply the loss of these steps (counted from 1) with ``value``; the last micro-batch only."""
    inner = trainer.compute_loss

    def compute(*args, **kwargs):
        loss = inner(*args, **kwargs)
        return loss * value if trainer.state.global_step + 1 in steps else loss

    trainer.compute_loss = compute
    return trainer


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("inf"), {}),
        (float("nan"), {"max_grad_norm": 0.0}),
        (float("nan"), {"gradient_accumulation_steps": 2}),
    ],
    ids=["clipped", "not clipped", "accumulated"],
)
def test_a_broken_step_is_not_taken(runs, tiny, tmp_path, value, options):
    states = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            values = [p.detach().clone() for p in trained(model)]
            states[state.global_step] = (values, copy.deepcopy(optimizer.state_dict()), lr_scheduler.last_epoch)

    options = {**options, "max_steps": 5, "save_steps": 3}
    trainer = runs.build(str(tiny()), str(tmp_path), callbacks=[Watch()], **options)
    with_broken_losses(trainer, {3}, value).train()
    (before, optimizer_before, epoch_before), (after, optimizer_after, epoch_after) = states[2], states[3]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert epoch_before == epoch_after == 2
    for key, state in optimizer_before["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, optimizer_after["state"][key][name])
    assert any(not torch.equal(a, b) for a, b in zip(after, states[4][0], strict=True))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert not math.isfinite(losses[3])
    assert math.isfinite(losses[4])
    final = trainer.state.log_history[-1]
    assert final["skipped_steps"] == 1
    assert math.isfinite(final["train_loss"])
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_every_fifth_step_is_counted_and_the_count_survives(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=11, save_steps=6)
    with_broken_losses(trainer, {5, 10}, float("inf")).train()
    assert trainer.state.log_history[-1]["skipped_steps"] == 2
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=11, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.log_history[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("what", [poison_one_tensor, poison_the_base])
def test_lasting_damage_ends_the_run(runs, tiny, tmp_path, what):
    options = {"save_steps": 2, "save_total_limit": 1, "max_steps": 50}
    trainer = runs.build(str(tiny()), str(tmp_path), callbacks=[Poison(5, what)], **options)
    with pytest.raises(TrainingError, match="checkpoint-4") as raised:
        trainer.train()
    assert trainer.state.global_step <= 4 + trainer.args.max_skipped_steps + 2
    assert len(str(raised.value).splitlines()) <= 5
    found = discovery.newest_whole(tmp_path).checkpoint
    saved = safetensors.torch.load_file(found.path / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_after_k_in_a_row_the_run_stops(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=20, save_steps=2, max_skipped_steps=3)
    with pytest.raises(TrainingError, match="3 steps in a row were not finite, up to step 6.*learning_rate .now 0.001"):
        with_broken_losses(trainer, set(range(4, 20)), float("nan")).train()
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_broken_weights_are_not_saved_on_request_either(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path / "out"))
    trainer.save_model(str(tmp_path / "good"))
    assert not (tmp_path / "good" / "training_args.bin").exists()
    poison_one_tensor(trainer.model)
    with pytest.raises(TrainingError, match="not finite any more"):
        trainer.save_model(str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()
