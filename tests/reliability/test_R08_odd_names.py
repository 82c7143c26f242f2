"""What is not a checkpoint is passed over with one message; an empty folder starts a run."""

import shutil

import pytest

from unsloth.core.errors import CheckpointError


def test_odd_names_are_ignored_with_one_message(runs, whole_run, tiny, tmp_path, messages):
    shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-77.tmp").mkdir()
    (tmp_path / "checkpoint-88").write_text("a file")
    (tmp_path / ".checkpoint-9.stage-somewhere-1-ab").mkdir()
    (tmp_path / "checkpoint-99").symlink_to(whole_run[0] / "checkpoint-8")
    trainer = runs.build(str(tiny()), str(tmp_path), save_steps=100)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    (message,) = [message for message in messages if "ignoring" in message]
    for part in (
        "checkpoint-20 (its manifest says step 4",
        "-30 (empty",
        "-abc (",
        "-77.tmp",
        "-88 (a file",
        "-99 (a sym",
    ):
        assert part in message
    assert any("resuming from" in message and message.endswith("checkpoint-4") for message in messages)
    assert not (tmp_path / ".checkpoint-9.stage-somewhere-1-ab").exists()


def test_R09_an_empty_folder_starts_at_the_beginning_and_says_so(runs, tiny, tmp_path, messages):
    trainer = runs.build(str(tiny()), str(tmp_path / "new"), max_steps=1)
    assert trainer.train(resume_from_checkpoint=True).global_step == 1
    assert any("no checkpoint in" in message and "starting at the beginning" in message for message in messages)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "empty"))


def test_an_earlier_longer_run_in_the_same_folder_is_not_taken_for_the_newest(runs, whole_run, tiny, tmp_path):
    shutil.copytree(whole_run[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    runs.build(str(tiny()), str(tmp_path), max_steps=2, seed=5).train()
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=3, seed=5, save_steps=100)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
