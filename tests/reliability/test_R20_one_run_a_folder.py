"""A second run in the same folder is refused; a dead one does not block; readers never see half a checkpoint."""

import os
import signal
import threading

import pytest
import safetensors.torch

from unsloth.core import artifact
from unsloth.core.errors import StorageError


def test_R20_a_second_run_is_refused_and_a_dead_one_does_not_block(runs, zygote, tiny, tmp_path):
    output = tmp_path / "out"
    process = zygote.start(tmp_path, model=str(tiny()), output_dir=str(output), dataloader_num_workers=1, pause=60)
    process.wait_for(tmp_path / "result" / "in-step-1")
    trainer = runs.build(str(tiny()), str(output), max_steps=2)
    with pytest.raises(StorageError, match=f"another run is writing to .* .process {process.pid} on "):
        trainer.train()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # its data loading worker may live on for some seconds
    assert trainer.train().global_step == 2
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]


def test_R20_a_run_without_checkpoints_needs_no_lock(runs, tiny, tmp_path):
    other = runs.build(str(tiny()), str(tmp_path), max_steps=1, save_strategy="no")
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=2, save_steps=1)
    log = trainer.log

    def log_and_train(*args, **kwargs):
        log(*args, **kwargs)
        if other.state.global_step == 0:
            other.train()

    trainer.log = log_and_train
    trainer.train()
    assert other.state.global_step == 1


def test_R21_a_reader_in_a_loop_sees_whole_checkpoints_only(runs, tiny, tmp_path):
    output, wrong, seen = tmp_path / "out", [], set()
    done = threading.Event()

    def read(path):
        try:
            found = artifact.verify(path)
            safetensors.torch.load_file(path / "adapter_model.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            found = [str(error)]
        if found and path.exists():  # it may have been rotated away meanwhile, as a whole
            wrong.append((path.name, found))
        seen.add(path.name)

    def watch():
        while not done.is_set():
            for path in [*output.glob("checkpoint-*"), *tmp_path.glob("model")]:
                read(path)

    trainer = runs.build(str(tiny()), str(output), max_steps=6, save_steps=1, save_total_limit=1)
    reader = threading.Thread(target=watch)
    reader.start()
    try:
        trainer.train()
        for _ in range(5):
            trainer.save_model(str(tmp_path / "model"))
    finally:
        done.set()
        reader.join()
    assert wrong == []
    assert "model" in seen
    assert len(seen) > 2


def test_saving_the_model_beside_its_checkpoints_keeps_them(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path), max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert artifact.verify(tmp_path) == artifact.verify(tmp_path / "checkpoint-2") == []
    listed = [record.name for record in artifact.read_manifest(tmp_path)["files"]]
    assert not [name for name in listed if name.startswith("checkpoint-")]
