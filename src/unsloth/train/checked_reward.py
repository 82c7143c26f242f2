"""A reward function as TRL calls it, of which nothing odd gets through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from unsloth.rewards.call import OnInvalid, RewardColumn, call_reward, name_of, synchronous
from unsloth.rewards.time_limit import execute_with_time_limit


class CheckedReward:
    """Calls one reward function within a time limit, and returns finite numbers, or NaN where it gave none.

    None from the function says that it does not apply to a completion, as in TRL. Whatever else is no finite number
    is an error, or masks the completion; see :func:`unsloth.rewards.call.call_reward`.

    Args:
        function: ``f(prompts, completions, **columns) -> list[float]``, ordinary or ``async``.
        on_invalid: ``"raise"`` or ``"mask"``.
        time_limit: Seconds that one call may take; None for no limit.
    """

    def __init__(self, function: Callable[..., Any], on_invalid: OnInvalid, time_limit: float | None) -> None:
        self.__name__ = name_of(function)
        limited = execute_with_time_limit(time_limit) if time_limit is not None else lambda plain: plain
        self._function = limited(synchronous(function))
        self._on_invalid = on_invalid
        self.last: RewardColumn | None = None
        """What the last call gave, with the reasons of masked completions."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        """As the function."""
        self.last = call_reward(
            self._function, prompts, completions, columns, on_invalid=self._on_invalid, skip_none=True
        )
        return self.last.values

    @property
    def masked(self) -> dict[int, str]:
        """Completions of the last call that must not be trained on, and why."""
        return {} if self.last is None else self.last.masked


def mask_whole_rows(rewards: list[CheckedReward], values: Any) -> Any:
    """Rewards (rows, functions) with NaN in all columns of a row that any function masked."""
    for row in {row for reward in rewards for row in reward.masked}:
        values[row] = math.nan
    return values
