"""SIGTERM, SIGINT and SIGHUP end a run with one checkpoint; a second signal ends it at once."""

import os
import signal
import sys
import threading
import time

import pytest
from transformers import TrainerCallback

from unsloth.train import interrupts


class Send(TrainerCallback):
    """Sends a signal to this process at an event of a step."""

    def __init__(self, event, step, number=signal.SIGTERM):
        self.event, self.step, self.number, self.sent = event, step, number, False
        setattr(self, f"on_{event}", self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_process_leaves_a_checkpoint_and_its_exit_code(zygote, tiny, tmp_path, number):
    workers = 1 if number == signal.SIGTERM else 0  # they get the signal, too, when it goes to the whole group
    spec = {"model": str(tiny()), "save_steps": 100, "pause": 0.2, "dataloader_num_workers": workers}
    process = zygote.start(tmp_path, output_dir=str(tmp_path / "out"), **spec)
    process.wait_for(tmp_path / "result" / "in-step-3")
    started = time.monotonic()
    os.killpg(process.pid, number)
    assert process.wait() == 128 + number, process.log
    assert time.monotonic() - started < 10
    (saved,) = (tmp_path / "out").iterdir()
    assert saved.name in ("checkpoint-2", "checkpoint-3")
    assert "Traceback" not in process.log


def test_a_second_signal_ends_it_at_once(zygote, tiny, tmp_path):
    process = zygote.start(tmp_path, model=str(tiny()), output_dir=str(tmp_path / "out"), save_steps=100, pause=20)
    process.wait_for(tmp_path / "result" / "in-step-1")
    started = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    while "again: at once" not in process.log:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("substep_end", 3, 3), ("prediction_step", 4, 4), ("save", 2, 2)],
)
def test_wherever_it_arrives_the_resumed_run_ends_the_same(runs, tiny, tmp_path, assert_equal, event, step, saved):
    options = {
        "model": str(tiny()),
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "eval_data": runs.rows(3, first=50),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 1,
        "save_steps": 2 if event == "save" else 100,
    }
    whole = runs.build(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    output = tmp_path / "parts"
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    trainer = runs.build(output_dir=str(output), callbacks=[Send(event, step)], **options)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == 143
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    assert f"checkpoint-{saved}" in [path.name for path in output.iterdir()]
    resumed = runs.build(output_dir=str(output), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(runs.weights(resumed), runs.weights(whole))
    for key in ("loss", "eval_loss"):
        found, expected = [
            [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
            for trainer in (resumed, whole)
        ]
        assert found == expected


def test_in_a_library_sigint_is_a_keyboard_interrupt_after_the_checkpoint(runs, tiny, tmp_path, monkeypatch):
    options = {"model": str(tiny()), "output_dir": str(tmp_path), "save_steps": 100}
    for step, interactive in ((2, False), (3, True)):
        if interactive:
            monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        trainer = runs.build(callbacks=[Send("step_end", step, signal.SIGINT)], **options)
        with pytest.raises(KeyboardInterrupt) as raised:
            trainer.train(resume_from_checkpoint=True)
        assert raised.type is (KeyboardInterrupt if interactive else interrupts.Interrupted)
        assert (tmp_path / f"checkpoint-{step}").is_dir()
    assert trainer.evaluate(runs.rows(2))["eval_loss"] > 0  # the trainer goes on being usable


def test_ignored_signals_stay_ignored_and_threads_have_none():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
    handlers = []

    def listen():
        with interrupts.listening():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_save_strategy_no_is_respected(runs, tiny, tmp_path):
    trainer = runs.build(str(tiny()), str(tmp_path / "out"), save_strategy="no", callbacks=[Send("step_end", 2)])
    with pytest.raises(SystemExit):
        trainer.train()
    assert not list((tmp_path / "out").iterdir())
