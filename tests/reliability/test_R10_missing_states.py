"""Without the optimizer's, schedule's or random state a run is not resumed, unless that is accepted by name."""

import shutil

import pytest

from unsloth.core.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "rng"])
def test_a_missing_state_must_be_accepted(runs, whole_run, tiny, tmp_path, name):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole_run[0] / "checkpoint-4", folder)
    (folder / f"{name}.json").unlink()
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=5, save_strategy="no")
    for given in (True, str(folder)):
        with pytest.raises(CheckpointError, match=f"{name}.json is missing"):
            trainer.train(resume_from_checkpoint=given)
    trainer.args.resume_allow = [name]
    assert trainer.train(resume_from_checkpoint=True).global_step == 5


def test_a_checkpoint_of_the_model_only(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=2, save_only_model=True)
    trainer.train()
    assert not list((tmp_path / "checkpoint-2").glob("optimizer*"))
    with pytest.raises(CheckpointError, match="holds no state of: optimizer, scheduler, rng"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.resume_allow = ["optimizer", "scheduler", "rng"]
    trainer.args.max_steps = 3
    assert trainer.train(resume_from_checkpoint=True).global_step == 3


def test_unknown_names_are_refused(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path), resume_allow=["lerning_rate"])
    with pytest.raises(ConfigError, match='Did you mean "learning_rate"'):
        trainer.train(resume_from_checkpoint=True)
