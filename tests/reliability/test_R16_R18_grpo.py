"""Signals, no memory, and broken numbers while completions are sampled."""

import os
import signal

import pytest
import torch

from unsloth.core.errors import DataError, GenerationError, UnslothError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_sampling_leaves_one_checkpoint(grpo_run, runs, assert_equal, tmp_path, number):
    whole = grpo_run("whole", max_steps=4)
    whole.train()
    trainer = grpo_run("parts", max_steps=4)
    rollouts, count = trainer.rollouts, [0]
    sample = rollouts.sample

    def interrupted(prompts, key, check, *more):
        def after_a_step():
            count[0] += 1
            if count[0] == 20:  # in the third generation of eight tokens
                os.kill(os.getpid(), number)
            check()

        return sample(prompts, key, after_a_step, *more)

    rollouts.sample = interrupted
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.train()
    assert count[0] == 20  # at once, not when the generation is over
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.is_dir()] == ["checkpoint-2"]
    resumed = grpo_run("parts", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(runs.weights(resumed), runs.weights(whole))


def test_no_memory_while_sampling(grpo_run, runs, assert_equal, monkeypatch):
    trainer = grpo_run(save_strategy="no")
    trainer.sample([[5] * 40])  # makes the engine
    before = runs.weights(trainer)

    def none_left(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.rollouts._engine._runner, "launch", none_left)
        with pytest.raises(GenerationError, match="out of memory") as raised:
            trainer.train()
    assert len(str(raised.value).splitlines()) <= 5
    assert_equal(runs.weights(trainer), before)
    trainer.train()  # and with memory, it goes on
    assert trainer.state.global_step == 6


def test_weights_that_are_not_numbers(grpo_run):
    trainer = grpo_run(save_strategy="no")
    next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(UnslothError):
        trainer.train()


def test_a_loss_that_is_not_finite_is_not_taken(grpo_run, runs):
    trainer = grpo_run(save_strategy="no", max_steps=4)
    compute = trainer._compute_loss

    def broken(model, inputs):
        loss = compute(model, inputs)
        return loss * float("inf") if trainer.state.global_step == 1 else loss

    trainer._compute_loss = broken
    trainer.train()
    assert trainer.state.log_history[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in runs.weights(trainer).values())


def test_prompts_that_are_too_long(grpo_run, messages):
    long = [{"prompt": "w" * 64}]
    with pytest.raises(DataError, match="64 tokens leaves no room in sequences of 64.*max_prompt_length"):
        grpo_run(rows=long, save_strategy="no").train()
    trainer = grpo_run(rows=long, max_prompt_length=10, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 1
    trainer = grpo_run(rows=[{"prompt": "w" * 60}], max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.state.log_history[0]["completions/max_length"] == 4  # what the context has left


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "1 + 1"}], r"no column 'prompt'.*rename_column\('question', 'prompt'\)"),
        ([{"prompt": "a"}, {"prompt": None}], "row 1 has no prompt"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1 has no prompt"),
        ([{"prompt": [{"text": "a"}]}], "row 0: its messages have no role"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "'prompt' holds values of different kinds"),
        ([{"prompt": "a", "chat_template_kwargs": "thinking"}], "row 0: chat_template_kwargs is no mapping"),
    ],
)
def test_rows_without_prompts(grpo_run, rows, message):
    with pytest.raises(DataError, match=message):
        grpo_run(rows=rows)
