"""A killed data loading worker, and rows that workers cannot tokenize, end in a clear error."""

import os
import signal
import time

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from unsloth.core.errors import DataError, TrainingError


class KillWorker(TrainerCallback):
    """Kills one child of this process at the third step."""

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step == 2:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()  # noqa: SIM115
            workers = [int(pid) for pid in children if b"zygote.py" not in open(f"/proc/{pid}/cmdline", "rb").read()]
            os.kill(workers[-1], signal.SIGKILL)
            time.sleep(0.3)


def test_a_killed_data_loading_worker(runs, tiny, tmp_path):
    data = runs.rows(200)
    trainer = runs.build(
        str(tiny()), str(tmp_path), data=data, max_steps=100, dataloader_num_workers=2, callbacks=[KillWorker()]
    )
    started = time.monotonic()
    with pytest.raises(TrainingError, match="a data loading worker died .*dataloader_num_workers .now 2.*checkpoint-2"):
        trainer.train()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("bad", [None, 7])
def test_a_row_that_a_worker_cannot_tokenize(runs, tiny, tmp_path, bad):
    data = runs.rows(800)
    data[777] = {"text": bad if bad is None else ""}
    with pytest.raises(DataError, match="row 777"):
        runs.build(str(tiny()), str(tmp_path), data=data, dataset_num_proc=2)


def test_a_formatting_function_that_fails_in_a_worker(runs, tiny, tmp_path):
    from unsloth import SFTConfig, SFTTrainer

    def formatting(row):
        if row["number"] == 777:
            raise ZeroDivisionError("a mistake")
        return f"number {row['number']}"

    trainer = runs.build(str(tiny()), str(tmp_path))
    with pytest.raises(DataError, match="row 777: formatting_func raised ZeroDivisionError: a mistake"):
        SFTTrainer(
            model=trainer.model,
            tokenizer=trainer.processing_class,
            train_dataset=[{"number": i} for i in range(800)],
            formatting_func=formatting,
            args=SFTConfig(output_dir=str(tmp_path), dataset_num_proc=2, use_cpu=True),
        )


def test_a_tokenizing_worker_that_is_killed(runs, tiny, tmp_path):
    from unsloth import SFTConfig, SFTTrainer

    parent = os.getpid()

    def formatting(row):
        if row["number"] == 777 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"number {row['number']}"

    trainer = runs.build(str(tiny()), str(tmp_path))
    with pytest.raises(DataError, match="a worker process that tokenized rows died.*dataset_num_proc"):
        SFTTrainer(
            model=trainer.model,
            tokenizer=trainer.processing_class,
            train_dataset=Dataset.from_list([{"number": i} for i in range(800)]),
            formatting_func=formatting,
            args=SFTConfig(output_dir=str(tmp_path), dataset_num_proc=2, use_cpu=True),
        )
