"""A resumed run ends with the weights, losses and steps of the undisturbed one."""

import pytest

KEYS = ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "mean_token_accuracy")


def entries(log):
    return [{key: entry[key] for key in KEYS if key in entry} for entry in log if "loss" in entry]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_from_each_checkpoint(runs, whole_run, tiny, tmp_path, assert_equal, step):
    output, weights, log = whole_run
    trainer = runs.build(str(tiny()), str(tmp_path / "out"))
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
    assert trainer.state.global_step == 8
    assert_equal(runs.weights(trainer), weights)
    assert entries(trainer.state.log_history) == entries(log)
