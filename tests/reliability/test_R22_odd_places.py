"""Clocks that jump, a temporary folder elsewhere, and folders with unusual names."""

import os
import shutil
import time
from pathlib import Path

import pytest

from unsloth.train import discovery

NAMES = {
    "spaced": "my run (2) 'quoted' *[1]?",
    "long": "x" * 250,
    "wide": "日" * 80,
    "not UTF-8": os.fsdecode(b"caf\xe9-\xff"),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_unusual_names(runs, tiny, tmp_path, name):
    output = tmp_path / name
    trainer = runs.build(str(tiny()), str(output), max_steps=4, save_total_limit=1)
    trainer.train()
    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    trainer = runs.build(str(tiny()), str(output), max_steps=6, save_steps=100)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(output / "model"))
    assert (output / "model" / "adapter_model.safetensors").is_file()


def test_clocks_and_file_times_do_not_matter(runs, tiny, tmp_path, monkeypatch):
    now = time.time
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=8, save_total_limit=2)
    monkeypatch.setattr(time, "time", lambda: now() - 1e6 * trainer.state.global_step)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    os.utime(tmp_path / "checkpoint-6", (2e9, 2e9))
    os.utime(tmp_path / "checkpoint-8", (0, 0))
    assert discovery.newest_whole(tmp_path).checkpoint.step == 8


def test_a_temporary_folder_on_another_disk(runs, tiny, tmp_path, monkeypatch):
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    monkeypatch.setenv("TMPDIR", str(other))
    runs.build(str(tiny()), str(tmp_path), max_steps=2).train()
    assert discovery.newest_whole(tmp_path).checkpoint.step == 2
    shutil.rmtree(tmp_path / "checkpoint-2")
