"""Odd rewards in training: an error with function, prompt and value, or a completion that is left out and counted."""

import asyncio
import time

import pytest
import torch

from unsloth.core.errors import ConfigError, RewardError


def constant(value):
    def odd(completions, **columns):
        return [value] * len(completions)

    return odd


def leave(completions, **columns):
    raise SystemExit(0)


def too_few(completions, **columns):
    return [1.0]


def scalar(completions, **columns):
    return 1.0


def generator(completions, **columns):
    return (1.0 for _ in completions)


def broken(completions, **columns):
    return [float(completion[100]) for completion in completions]


async def late(completions, **columns):
    await asyncio.sleep(60)


def hangs(completions, **columns):
    time.sleep(60)


ODD = {
    "none": (constant(None), "applies to completion 0.*None"),
    "nan": (constant(float("nan")), "'odd' returned nan for completion 0, prompt 'Say"),
    "infinite": (constant(float("-inf")), "'odd' returned -inf for completion 0, prompt 'Say"),
    "text": (constant("good"), "'odd' returned str 'good' for completion 0"),
    "too few": (too_few, "'too_few' returned 1 values for 4 completions"),
    "one number": (scalar, "'scalar' returned a float"),
    "generator": (generator, "'generator' returned a generator"),
    "exit": (leave, "'leave' raised SystemExit for completion 0"),
    "error": (broken, "'broken' raised IndexError for completion 0, prompt 'Say"),
    "hangs": (hangs, "'hangs' raised SandboxTimeoutError: hangs took longer than 0.2 seconds"),
    "hangs asynchronously": (late, "'late' raised SandboxTimeoutError: late took longer than 0.2 seconds"),
}


@pytest.mark.parametrize("kind", ODD)
def test_the_run_ends_with_an_error_that_says_all(grpo_run, runs, assert_equal, kind):
    function, message = ODD[kind]
    trainer = grpo_run(reward_funcs=[function], reward_time_limit=0.2, save_strategy="no")
    before = runs.weights(trainer)
    with pytest.raises(RewardError, match=message) as raised:
        trainer.train()
    assert len(str(raised.value).splitlines()) <= 5
    assert_equal(runs.weights(trainer), before)


@pytest.mark.parametrize("kind", ODD)
def test_or_the_completions_are_left_out_and_counted(grpo_run, runs, assert_equal, kind):
    """All are left out: nothing is learned, and nothing breaks."""
    options = {"invalid_rewards": "mask", "reward_time_limit": 0.1, "max_steps": 2, "save_strategy": "no"}
    trainer = grpo_run(reward_funcs=[ODD[kind][0]], **options)
    before = runs.weights(trainer)
    trainer.train()
    counts = [entry["rewards/masked"] for entry in trainer.state.log_history if "rewards/masked" in entry]
    assert counts == [4, 4]
    assert_equal(runs.weights(trainer), before)


def test_one_bad_completion_is_left_out_of_its_group(grpo_run):
    def third_is_bad(completions, **columns):
        return [float("nan") if i == 2 else float(i) for i in range(len(completions))]

    trainer = grpo_run(reward_funcs=[third_is_bad], invalid_rewards="mask", max_steps=1, save_strategy="no")
    seen = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs["advantages"]) or loss(model, inputs)
    trainer.train()
    mean, deviation = torch.tensor([0.0, 1.0, 3.0]).mean(), torch.tensor([0.0, 1.0, 3.0]).std()
    expected = [(value - mean) / (deviation + 1e-4) for value in (0.0, 1.0)] + [0.0, (3 - mean) / (deviation + 1e-4)]
    torch.testing.assert_close(seen[0], torch.tensor(expected))


def test_a_function_may_not_apply_to_a_completion(grpo_run):
    def even(completions, **columns):
        return [1.0 if i % 2 == 0 else None for i in range(len(completions))]

    def always(completions, **columns):
        return [float(i) for i in range(len(completions))]

    trainer = grpo_run(reward_funcs=[even, always], max_steps=1, save_strategy="no")
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["rewards/masked"] == 0 and entry["reward"] == pytest.approx((1 + 1 + 3 + 3) / 4)


def test_equal_rewards_are_said_once(grpo_run, messages):
    grpo_run(reward_funcs=[constant(1.0)], max_steps=3, save_strategy="no").train()
    assert sum("nothing to learn" in message for message in messages) <= 1


def test_a_column_that_is_not_there(grpo_run):
    def correct(completions, solution, answer):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="'correct' needs the column 'solution'.*'answer'"):
        grpo_run(reward_funcs=[correct])
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        grpo_run(reward_funcs=None)
    with pytest.raises(ConfigError, match="cannot be called"):
        grpo_run(reward_funcs=[3])
