"""A GRPO run that was killed goes on with the step, and the completions, that it would have had."""

import shutil

import pytest
import torch
from transformers import TrainerCallback

CYCLES = {
    "in the second epoch": {"save_steps": 6},
    "two steps a generation": {"steps_per_generation": 2, "save_steps": 3},
    "completions used twice": {"num_iterations": 2, "save_steps": 3, "beta": 0.04},
    "accumulated": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "save_steps": 3},
    "computed together": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "save_steps": 3,
        "tokens_per_pass": 4096,
    },  # fmt: skip
}


class Completions(TrainerCallback):
    """Keeps what was sampled, by step."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.found[state.global_step] = [batch["completion_ids"].clone() for batch in trainer._buffered_inputs]


@pytest.mark.parametrize("cycle", CYCLES)
def test_a_resumed_run_equals_one_that_was_not_stopped(grpo_run, runs, assert_equal, tmp_path, cycle):
    options = {"save_steps": 2, "max_steps": 7, "eval_strategy": "steps", "eval_steps": 4, **CYCLES[cycle]}

    def run(folder, resume=None, **changes):
        seen = Completions()
        held_out = [{"prompt": "Hold", "answer": ""}, {"prompt": "out", "answer": ""}]
        trainer = grpo_run(folder, callbacks=[seen], eval_dataset=held_out, **{**options, **changes})
        seen.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen.found

    whole, expected = run("whole")
    stop = options["save_steps"]
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
    resumed, found = run("resumed", resume=True)
    assert list(found) == list(range(stop + 1, 8))
    for step, batches in found.items():
        for ours, theirs in zip(batches, expected[step], strict=True):
            assert torch.equal(ours, theirs), step
    assert_equal(runs.weights(resumed), runs.weights(whole))
    for key in ("loss", "reward", "eval_reward", "completions/mean_length", "num_tokens"):
        ours, theirs = [
            [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
            for trainer in (resumed, whole)
        ]
        assert ours == theirs, key


def test_completions_follow_from_the_seed(grpo_run):
    found = []
    for seed in (1, 1, 2):
        seen = Completions()
        seen.trainer = grpo_run(callbacks=[seen], max_steps=1, seed=seed, save_strategy="no")
        torch.randn(seed)  # numbers that somebody else drew
        seen.trainer.train()
        found.append(seen.found[1][0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
