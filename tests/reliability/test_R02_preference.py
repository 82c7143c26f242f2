"""Preference training survives as supervised fine-tuning does: exact resumption, and steps that are not finite."""

import math

import pytest
import torch

from unsloth import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer

PAIRS = [{"prompt": f"{i}: ", "chosen": "well " * (1 + i % 4), "rejected": "no " * (1 + i % 3)} for i in range(10)]
METHODS = {
    "dpo": ((DPOTrainer, DPOConfig), {}),
    "dpo, reference beforehand": ((DPOTrainer, DPOConfig), {"precompute_ref_log_probs": True}),
    "orpo": ((ORPOTrainer, ORPOConfig), {}),
    "kto": ((KTOTrainer, KTOConfig), {}),
}
KEYS = ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "rewards/margins", "logps/chosen")


def build(runs, model, output, method, **changes):
    classes, particular = METHODS[method]
    options = {"disable_dropout": False, "bf16": False, "max_steps": 4, **particular, **changes}
    return runs.build(str(model), str(output), data=PAIRS, classes=classes, **options)


def entries(log):
    return [{key: entry[key] for key in KEYS if key in entry} for entry in log if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_the_undisturbed_one(runs, tiny, tmp_path, assert_equal, method):
    whole = build(runs, tiny(), tmp_path / "out", method)
    whole.train()
    resumed = build(runs, tiny(), tmp_path / "again", method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(runs.weights(resumed), runs.weights(whole))
    assert entries(resumed.state.log_history) == entries(whole.state.log_history)
    assert len(entries(whole.state.log_history)) == 4


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_step_that_is_not_finite_is_not_taken(runs, tiny, tmp_path, method):
    trainer = build(runs, tiny(), tmp_path, method, save_steps=1)
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        inner(*args, **kwargs) * (float("nan") if trainer.state.global_step == 2 else 1.0)
    )
    trainer.train()
    losses = [entry["loss"] for entry in entries(trainer.state.log_history)]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
    assert trainer.state.log_history[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(weight).all() for weight in runs.weights(trainer).values())

    def adapter(step):
        return (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()

    assert adapter(3) == adapter(2) != adapter(4)
