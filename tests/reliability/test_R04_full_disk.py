"""R04 to R06: full disks, disks that are too small, and folders that cannot be written to."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch

from unsloth import SFTConfig
from unsloth.core.errors import StorageError
from unsloth.train import states

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("when", "message"),
    [("before the save", "not enough disk space in"), ("during the save", "the disk became full while writing")],
)
def test_R04_a_full_disk_leaves_the_old_checkpoint(zygote, whole_run, tiny, tmp_path, assert_equal, when, message):
    spec = {"model": str(tiny()), "disk": 40_000_000, "when": when}
    process = zygote.start(tmp_path, output_dir=str(tmp_path / "out"), **spec)
    assert process.wait() == 0, process.log
    report = json.loads((tmp_path / "result" / "report.json").read_text())
    if "unavailable" in report:
        pytest.skip(f"needs a file system of its own: {report['unavailable']}")
    assert f"StorageError: {message}" in report["error"]
    assert "bytes needed" in report["error"]
    assert report["left"] == ["checkpoint-2", "filler"]
    assert report["problems"] == []
    assert_equal(safetensors.torch.load_file(tmp_path / "result" / "weights.safetensors"), whole_run[1])


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_R04_a_disk_that_fills_up_half_way(runs, tiny, tmp_path, monkeypatch, error):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=4)
    write = states.write

    def full(value, folder, name):
        write(value, folder, name)
        if trainer.state.global_step == 4 and name == "scheduler":
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(states, "write", full)
    with pytest.raises(StorageError, match=r"bytes needed, [\d,]+ bytes free"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_R04_the_refusal_of_the_library_that_writes_tensors(runs, tiny, tmp_path, monkeypatch):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=2)

    def full(*args, **kwargs):
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise safetensors.SafetensorError(text)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(StorageError, match="the disk became full while writing .*checkpoint-2"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_R05_a_disk_known_to_be_too_small(runs, tiny, tmp_path, monkeypatch, messages):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StorageError, match=r"no room for a checkpoint .* 1,000 free"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 2_000_000))
    trainer.train()
    assert any("set save_total_limit" in message for message in messages)


def test_R06_folders_that_cannot_be_written_to(runs, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="would be inside a file, or is one"):
            SFTConfig(output_dir=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(StorageError, match="cannot be written to"):
            SFTConfig(output_dir=str(tmp_path / "new"))
    with monkeypatch.context() as patch:

        def over_quota(descriptor):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        patch.setattr(os, "fsync", over_quota)
        with pytest.raises(StorageError, match="quota"):
            runs.build(str(tiny()), str(tmp_path / "out"))
    assert list(Path(tmp_path / "out").iterdir()) == []
