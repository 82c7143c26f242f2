"""Runs that can be killed, and small helpers of the reliability tests."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).with_name("zygote.py")


@pytest.fixture(scope="session")
def runs() -> Iterator[ModuleType]:
    """The module ``zygote.py``: builds trainers in this process."""
    spec = importlib.util.spec_from_file_location("reliability_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Each run collects garbage once, which takes most of a second with all that torch and transformers have loaded.
    gc.collect()
    gc.freeze()
    yield module
    gc.unfreeze()


class Process:
    """A training run in a process of its own."""

    def __init__(self, zygote: Zygote, pid: int, log: Path) -> None:
        self.zygote, self.pid, self._log = zygote, pid, log

    def wait(self) -> int:
        """Its exit status; negative for a signal."""
        return int(self.zygote.ask({"wait": self.pid}))

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, path: Path, seconds: float = 30) -> None:
        """Until a file or folder is there."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end, f"{path} did not appear\n{self.log}"
            time.sleep(0.005)


class Zygote:
    """The process that forks training runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline().strip() == "ready"
        self._count = 0

    def ask(self, request: dict) -> str:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def start(self, folder: Path, **spec) -> Process:
        """Start a run whose log is in ``folder``; see ``zygote.run`` for the rest."""
        self._count += 1
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"log-{self._count}.txt"
        request = {"result": str(folder / "result"), **spec, "log": str(log)}
        return Process(self, int(self.ask({"start": request})), log)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    server = Zygote()
    yield server
    server.close()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the library logs during the test."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep()
    logging.getLogger("unsloth").addHandler(handler)
    yield found
    logging.getLogger("unsloth").removeHandler(handler)


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[dict, dict], None]:
    """``assert_equal(actual, expected)``: two mappings of tensors, bit for bit."""

    def compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert actual.keys() == expected.keys()
        different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
        assert not different

    return compare


@pytest.fixture(scope="session")
def whole_run(runs, tiny, tmp_path_factory):
    """An undisturbed run of 8 steps with a checkpoint every second: its output folder, weights, and log."""
    output = tmp_path_factory.mktemp("whole") / "out"
    trainer = runs.build(str(tiny()), str(output))
    trainer.train()
    return output, runs.weights(trainer), trainer.state.log_history


@pytest.fixture
def grpo_run(tiny, tmp_path):
    """``grpo_run(folder, **changes)``: a GRPO trainer whose reward is some number from 0 to 6 of each completion."""

    def letters(completions, **columns):
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    def build(folder="out", reward_funcs=letters, rows=None, callbacks=None, eval_dataset=None, **changes):
        from unsloth import FastLanguageModel, GRPOConfig, GRPOTrainer

        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_16bit=True
        )
        options = {
            "max_steps": 6,
            "save_steps": 100,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 2e-2,
        }
        return GRPOTrainer(
            model=FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False),
            processing_class=tokenizer,
            reward_funcs=reward_funcs,
            args=GRPOConfig(output_dir=str(tmp_path / folder), **{**options, **changes}),
            train_dataset=rows or [{"prompt": f"Say {i}:", "answer": str(i)} for i in range(5)],
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return build
