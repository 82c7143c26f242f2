"""Several reward functions as one: weights, masks, statistics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

from unsloth.core.errors import ConfigError, SandboxUnavailableError
from unsloth.core.log import get_logger
from unsloth.rewards.call import OnInvalid, RewardColumn, call_reward, name_of

logger = get_logger(__name__)


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of a batch.

    Attributes:
        total: Weighted sum over the functions; NaN for a row that any of them masked. Such a row must be left out of
            the loss and of its group's mean, not counted as 0.
        columns: What each function gave, unweighted, in order.
    """

    total: list[float]
    columns: list[RewardColumn]

    @property
    def masked(self) -> list[bool]:
        """Rows without a reward."""
        return [math.isnan(value) for value in self.total]


@dataclass(frozen=True)
class RewardStatistics:
    """One function's rewards so far.

    Attributes:
        count: Rewards given. masked: Completions without one. infra: Those of them that the machinery failed.
        mean, std, minimum, maximum: Of the unweighted rewards; ``std`` over the population; NaN before the first.
        seconds: Wall-clock time spent in the function.
    """

    count: int
    masked: int
    infra: int
    mean: float
    std: float
    minimum: float
    maximum: float
    seconds: float


class _Accumulator:
    """Running mean and variance (Welford, 1962), extremes and counts."""

    def __init__(self) -> None:
        self.count = self.masked = self.infra = 0
        self.mean = self.squares = self.seconds = 0.0
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, column: RewardColumn) -> None:
        for value in column.values:
            if math.isnan(value):
                continue
            self.count += 1
            step = value - self.mean
            self.mean += step / self.count
            self.squares += step * (value - self.mean)
            self.minimum, self.maximum = min(self.minimum, value), max(self.maximum, value)
        self.masked += len(column.masked)
        self.infra += column.infra
        self.seconds += column.seconds

    def statistics(self) -> RewardStatistics:
        known = self.count > 0
        return RewardStatistics(
            count=self.count,
            masked=self.masked,
            infra=self.infra,
            mean=self.mean if known else math.nan,
            std=math.sqrt(self.squares / self.count) if known else math.nan,
            minimum=self.minimum if known else math.nan,
            maximum=self.maximum if known else math.nan,
            seconds=self.seconds,
        )


class Rewards:
    """Reward functions with weights, called together.

    Is itself a reward function: ``Rewards([...])(prompts, completions, **columns)`` returns the weighted sums.
    ``async`` functions run at the same time as each other, after the ordinary ones.

    Args:
        functions: ``f(prompts, completions, **columns) -> list[float]``, at least one.
        weights: One a function; all 1 by default.
        on_invalid: ``"raise"`` a :class:`~unsloth.core.errors.RewardError` at None, NaN, infinity, texts, wrong
            lengths and exceptions, or ``"mask"`` the completions concerned, and count them.
        max_infra: After so many batches in a row with failures of the machinery, stop.

    Raises:
        ConfigError: No function, something that cannot be called, or weights that do not fit.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        weights: Sequence[float] | None = None,
        *,
        on_invalid: OnInvalid = "raise",
        max_infra: int = 3,
    ) -> None:
        functions = list(functions)
        weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if not functions or not all(callable(function) for function in functions):
            raise ConfigError("rewards need functions", got=functions, do="Pass a list of reward functions.")
        if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"weights of {len(functions)} reward functions", got=weights, do="Pass one number each.")
        self.functions = functions
        self.weights = weights
        self.names = _distinct([name_of(function) for function in functions])
        self.on_invalid: OnInvalid = on_invalid
        self.max_infra = max_infra
        self.__name__ = "rewards"
        self._infra_in_a_row = 0
        self._accumulators = {name: _Accumulator() for name in self.names}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Weighted sums, NaN where masked; see :meth:`score`."""
        return self.score(prompts, completions, **columns).total

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> RewardBatch:
        """Call every function.

        Raises:
            RewardError: See ``on_invalid``.
            SandboxUnavailableError: The machinery failed in ``max_infra`` batches in a row.
        """
        results: dict[int, RewardColumn] = {}

        def call(index: int) -> None:
            results[index] = call_reward(
                self.functions[index], prompts, completions, columns, on_invalid=self.on_invalid
            )

        waiting = [index for index, function in enumerate(self.functions) if _is_async(function)]
        for index in range(len(self.functions)):
            if index not in waiting:
                call(index)
        if waiting:
            with ThreadPoolExecutor(len(waiting), thread_name_prefix="reward") as pool:
                for done in [pool.submit(copy_context().run, call, index) for index in waiting]:
                    done.result()
        ordered = [results[index] for index in range(len(self.functions))]
        for name, column in zip(self.names, ordered, strict=True):
            self._accumulators[name].add(column)
        self._count_infra(ordered)
        total = [self._sum(ordered, row) for row in range(len(completions))]
        return RewardBatch(total, ordered)

    def statistics(self) -> dict[str, RewardStatistics]:
        """Name of the function → its rewards since the start."""
        return {name: accumulator.statistics() for name, accumulator in self._accumulators.items()}

    def _sum(self, ordered: Sequence[RewardColumn], row: int) -> float:
        return math.fsum(weight * column.values[row] for weight, column in zip(self.weights, ordered, strict=True))

    def _count_infra(self, ordered: Sequence[RewardColumn]) -> None:
        failed = next((column for column in ordered if column.infra), None)
        self._infra_in_a_row = self._infra_in_a_row + 1 if failed else 0
        if failed is None:
            return
        reason = next(iter(failed.masked.values()))
        logger.warning("reward %s: %d completions masked (%s)", failed.name, failed.infra, reason[:300])
        if self._infra_in_a_row >= self.max_infra:
            raise SandboxUnavailableError(
                f"reward {failed.name!r} could not be computed in {self._infra_in_a_row} batches in a row: {reason}",
                do="Repair that, then go on from the last checkpoint.",
            )


def _is_async(function: Any) -> bool:
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where they repeat."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result
