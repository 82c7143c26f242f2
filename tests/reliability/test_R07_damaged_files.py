"""Every damaged file of a checkpoint is found and named; resuming falls back or stops."""

import shutil

import pytest

from unsloth.core import artifact
from unsloth.core.errors import CheckpointError
from unsloth.train import discovery


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.fixture
def output(whole_run, tmp_path):
    """A copy of the folder of a run, with its last two checkpoints."""
    for step in (6, 8):
        shutil.copytree(whole_run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


@pytest.mark.parametrize("damage", [truncate, zero, flip, lambda path: path.unlink()])
def test_each_file(output, damage):
    files = sorted(path.name for path in (output / "checkpoint-8").iterdir())
    assert {"manifest.json", "adapter_model.safetensors", "optimizer.safetensors", "rng.json"} <= set(files)
    for name in files:
        if name == artifact.MANIFEST and "lambda" in damage.__name__:
            continue  # a folder without a manifest is one of another program
        whole = (output / "checkpoint-8" / name).read_bytes()
        damage(output / "checkpoint-8" / name)
        found = discovery.newest_whole(output)
        assert found.checkpoint.step == 6
        assert len(found.skipped) == 1
        assert name in found.skipped[0]
        with pytest.raises(CheckpointError, match=name):
            discovery.require_whole(output / "checkpoint-8")
        (output / "checkpoint-8" / name).write_bytes(whole)
    assert discovery.newest_whole(output).checkpoint.step == 8


def test_every_bit_of_the_manifest_counts(output):
    path = output / "checkpoint-8" / artifact.MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 400, 1)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        assert discovery.newest_whole(output).checkpoint.step == 6, place


def test_resuming_never_trains_on_it(runs, output, tiny, caplog):
    flip(output / "checkpoint-8" / "adapter_model.safetensors")
    trainer = runs.build(str(tiny()), str(output), save_strategy="no")
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors .* The newest whole one there is checkpoint-6"
    ):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-8"))
    truncate(output / "checkpoint-6" / "rng.json")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: .*adapter_model.*rng.json"):
        trainer.train(resume_from_checkpoint=True)
