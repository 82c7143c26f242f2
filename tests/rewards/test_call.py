import asyncio
import math
import threading
import time

import numpy as np
import pytest
import torch

from unsloth.core.errors import ConfigError, RewardError
from unsloth.rewards import Rewards, call_reward

PROMPTS, COMPLETIONS = ["one", "two", "three"], ["a", "b", "c"]


def giving(values, name="mine"):
    def function(**columns):
        return values

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    "values",
    [[1, 2.0, True], (1, 2, 1),
     np.array([1, 2, 1]), torch.tensor([1.0, 2.0, 1.0]), [np.float32(1), 2, torch.tensor(1)]],
    ids=["list", "tuple", "array", "tensor", "scalars"],
)  # fmt: skip
def test_numbers_in_any_form_become_floats(values):
    column = call_reward(giving(values), PROMPTS, COMPLETIONS)
    assert column.values == [1.0, 2.0, 1.0] and all(type(value) is float for value in column.values)
    assert not column.masked and column.name == "mine"


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("2.0", "str '2.0'"),
        ([1.0], "list"),
        (1j, "complex"),
        (10**400, "an integer beyond the range of floats"),
        (np.float32("nan"), "nan"),
    ],
)
def test_a_bad_value_names_function_prompt_and_value_or_is_masked(bad, shown):
    function = giving([1.0, bad, 2.0])
    with pytest.raises(RewardError) as caught:
        call_reward(function, PROMPTS, COMPLETIONS)
    for part in ("'mine'", shown, "completion 1", "'two'", "mask invalid rewards"):
        assert part in str(caught.value)
    column = call_reward(function, PROMPTS, COMPLETIONS, on_invalid="mask")
    assert column.values[0] == 1.0 and column.values[2] == 2.0 and math.isnan(column.values[1])
    assert list(column.masked) == [1] and column.infra == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "'mine' returned 2 values for 3 completions"),
        ([1.0] * 4, "'mine' returned 4 values for 3 completions"),
        (1.0, "'mine' returned a float"),
        (None, "'mine' returned a NoneType"),
        ((x for x in [1.0] * 3), "'mine' returned a generator"),
        ({"a": 1.0}, "'mine' returned a dict"),
        (torch.tensor(1.0), "'mine' returned a float"),
    ],
    ids=["short", "long", "scalar", "nothing", "generator", "dict", "tensor"],
)
def test_something_else_than_a_list_of_the_right_length(returned, message):
    with pytest.raises(RewardError, match=message):
        call_reward(giving(returned), PROMPTS, COMPLETIONS)
    column = call_reward(giving(returned), PROMPTS, COMPLETIONS, on_invalid="mask")
    assert list(column.masked) == [0, 1, 2] and all(math.isnan(value) for value in column.values)


def test_columns_reach_those_who_name_them():
    def plain(completions, answer):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    def greedy(prompts, completions, **columns):
        assert sorted(columns) == ["answer", "other"]
        return [0.0] * len(prompts)

    columns = {"answer": ["a", "x", "c"], "other": [1, 2, 3]}
    assert call_reward(plain, PROMPTS, COMPLETIONS, columns).values == [1.0, 0.0, 1.0]
    assert call_reward(greedy, PROMPTS, COMPLETIONS, columns).values == [0.0] * 3


def test_the_failing_row_is_found_with_its_own_columns():
    def divide(completions, answer):
        return [1 / value for value in answer]

    with pytest.raises(RewardError, match="raised ZeroDivisionError for completion 2, prompt 'three'"):
        call_reward(divide, PROMPTS, COMPLETIONS, {"answer": [1, 2, 0]})


def test_prompts_and_completions_must_pair():
    with pytest.raises(ConfigError, match="differ in number"):
        call_reward(giving([1.0]), ["p"], ["a", "b"])
    with pytest.raises(ConfigError, match="on_invalid"):
        call_reward(giving([1.0]), ["p"], ["a"], on_invalid="ignore")


async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(completion)) for completion in completions]


def test_async_functions_with_and_without_a_running_loop():
    async def within():
        return call_reward(later, PROMPTS, COMPLETIONS).values

    assert call_reward(later, PROMPTS, COMPLETIONS).values == [1.0] * 3
    assert asyncio.run(within()) == [1.0] * 3


def test_an_async_function_that_raises_is_a_typed_error():
    async def failing(completions, **columns):
        raise ValueError("no")

    with pytest.raises(RewardError, match="'failing' raised ValueError"):
        call_reward(failing, PROMPTS, COMPLETIONS)


def test_async_functions_wait_together():
    barrier = threading.Barrier(2, timeout=20)

    async def meet(completions, **columns):
        await asyncio.to_thread(barrier.wait)  # passes only if the other one is there too
        return [1.0] * len(completions)

    rewards = Rewards([meet, giving([1.0, 2.0, 3.0]), meet])
    assert rewards(PROMPTS, COMPLETIONS) == [3.0, 4.0, 5.0]


def test_weights_names_and_columns():
    rewards = Rewards([giving([1.0, 2.0, 3.0], "a"), giving([1.0, 0.0, 1.0], "b"), later], weights=[2, -1, 0.5])
    batch = rewards.score(PROMPTS, COMPLETIONS)
    assert batch.total == [1.5, 4.5, 5.5] and batch.masked == [False] * 3
    assert [column.name for column in batch.columns] == ["a", "b", "later"]
    assert Rewards([giving([1.0]), giving([1.0])]).names == ["mine", "mine_2"]
    assert call_reward(rewards, PROMPTS, COMPLETIONS).name == "rewards"  # itself a reward function


def test_a_row_masked_by_one_function_has_no_total_and_is_counted():
    rewards = Rewards([giving([1.0, None, 3.0], "a"), giving([1.0, 1.0, 1.0], "b")], on_invalid="mask")
    batch = rewards.score(PROMPTS, COMPLETIONS)
    assert batch.masked == [False, True, False] and batch.total[0] == 2.0
    assert rewards.statistics()["a"].masked == 1 and rewards.statistics()["b"].masked == 0


def test_statistics_are_those_of_all_values_so_far():
    numbers = np.random.default_rng(0).normal(3.0, 2.0, size=(20, 3))
    current = []
    rewards = Rewards([lambda completions, **_: current[-1]])
    for row in numbers:
        current.append(list(row))
        rewards(PROMPTS, COMPLETIONS)
    found = next(iter(rewards.statistics().values()))
    assert found.count == 60 and found.masked == found.infra == 0
    assert found.mean == pytest.approx(numbers.mean()) and found.std == pytest.approx(numbers.std())
    assert (found.minimum, found.maximum) == (numbers.min(), numbers.max())


def test_seconds_are_those_of_the_function():
    def slow(completions, **columns):
        time.sleep(0.05)
        return [0.0] * 3

    rewards = Rewards([slow, giving([0.0] * 3)])
    rewards(PROMPTS, COMPLETIONS)
    found = rewards.statistics()
    assert found["slow"].seconds >= 0.05 > found["mine"].seconds


@pytest.mark.parametrize(("functions", "weights"), [([], None), ([1], None), ([later], [1, 2]), ([later], [math.nan])])
def test_rewards_that_make_no_sense_are_refused(functions, weights):
    with pytest.raises(ConfigError):
        Rewards(functions, weights)


@pytest.mark.parametrize("number", range(8))
def test_messages_have_five_lines_at_most(number):
    bad = [None, "x" * 5000, [1] * 500, math.nan][number % 4]
    with pytest.raises(RewardError) as caught:
        call_reward(giving([bad]), ["p\n" * 200], ["c"])
    assert len(str(caught.value).splitlines()) <= 5 and len(str(caught.value)) < 600
