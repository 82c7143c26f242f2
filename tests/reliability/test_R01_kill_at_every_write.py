"""Killed at any file operation of a save, a run resumes from this step or the previous one, and ends the same."""

import shutil
import sys
from pathlib import Path

import pytest

from unsloth.core import artifact
from unsloth.train import discovery

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


@pytest.fixture(scope="module")
def snapshots(runs, tiny, tmp_path_factory):
    """The output folder before each file operation of one save (the second, which deletes the first), in order."""
    folder = tmp_path_factory.mktemp("kills")
    output, taken = folder / "out", []
    trainer = runs.build(str(tiny()), str(output), save_total_limit=1)
    state = {"recording": False, "busy": False}

    def hook(event, arguments):
        if not state["recording"] or state["busy"] or event not in EVENTS:
            return
        if event == "open" and not any(letter in str(arguments[1] or "") for letter in "wax+"):
            return
        state["busy"] = True
        taken.append(folder / f"before-{len(taken)}")
        shutil.copytree(output, taken[-1])
        state["busy"] = False

    write = trainer._write

    def recorded(*args):
        state["recording"] = trainer.state.global_step == 4
        write(*args)
        state["recording"] = False

    trainer._write = recorded
    sys.addaudithook(hook)
    trainer.train()
    return taken


def visible(folder: Path) -> tuple:
    return tuple(
        (file.relative_to(folder).as_posix(), file.stat().st_size)
        for file in sorted(folder.glob("checkpoint-*/**/*"))
        if file.is_file()
    )


def test_R03_there_is_a_whole_checkpoint_at_every_instant(snapshots):
    assert len(snapshots) > 12
    for folder in snapshots:
        assert discovery.newest_whole(folder).checkpoint is not None, folder


def test_a_checkpoint_is_whole_as_soon_as_it_has_its_name(snapshots):
    for folder in snapshots:
        for path in folder.glob("checkpoint-*"):
            assert artifact.verify(path) == [], folder


def test_each_state_of_the_disk_resumes_to_the_same_end(snapshots, runs, whole_run, tiny, assert_equal):
    _, weights, _ = whole_run
    distinct = {visible(folder): folder for folder in snapshots}
    found = {discovery.newest_whole(folder).checkpoint.step for folder in distinct.values()}
    assert found == {2, 4}
    for folder in distinct.values():
        trainer = runs.build(str(tiny()), str(folder), save_strategy="steps", save_steps=100)
        trainer.train(resume_from_checkpoint=True)
        assert_equal(runs.weights(trainer), weights)
        assert not [path.name for path in folder.iterdir() if ".stage-" in path.name or ".retired-" in path.name]
