"""Call one reward function and get finite numbers, or an error that says which function, which prompt, which value."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Literal

from unsloth.core.errors import ConfigError, RewardError
from unsloth.rewards import infra
from unsloth.rewards.completions import text_of

OnInvalid = Literal["raise", "mask"]

_NONE = "None"


@dataclass(frozen=True)
class RewardColumn:
    """What one function gave for a batch.

    Attributes:
        name: The function's name.
        values: One finite number a completion; NaN where masked.
        masked: Row → why it has no reward and must not be trained on.
        infra: How many of the masked rows are so because the machinery failed (a sandbox, a judge).
        seconds: Wall-clock time of the call.
    """

    name: str
    values: list[float]
    masked: dict[int, str]
    infra: int
    seconds: float


def name_of(function: Any) -> str:
    """The name under which a reward function is reported."""
    return str(getattr(function, "__name__", None) or type(function).__name__)


def synchronous(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` itself; or for an ``async`` one, an ordinary function that waits for it."""
    if not inspect.iscoroutinefunction(function):
        return function

    @functools.wraps(function)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        return _wait_for(function(*args, **kwargs))

    return waiting


def call_reward(
    function: Callable[..., Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any] | None = None,
    *,
    on_invalid: OnInvalid = "raise",
    skip_none: bool = False,
) -> RewardColumn:
    """Call ``function(prompts=…, completions=…, **columns)``, an ordinary or an ``async`` one.

    Columns that it does not name are left out unless it takes ``**kwargs``. Rows for which a sandbox or a judge
    failed meanwhile are masked whatever the function made of it.

    Args:
        function: The reward function.
        prompts: Texts or lists of messages.
        completions: As many.
        columns: Further columns of the data set, as many values each.
        on_invalid: ``"raise"``, or ``"mask"`` the rows concerned: all, if it raised or returned no list of the right
            length.
        skip_none: Whether None says that the function does not apply to a row, instead of being invalid: the
            value is NaN, and the row is not masked.

    Raises:
        RewardError: The function raised, or a value is None, NaN, infinite or not a number, or there are too many or
            too few of them.
    """
    if on_invalid not in ("raise", "mask"):
        raise ConfigError("unknown on_invalid", got=on_invalid, do='Use "raise" or "mask".')
    if len(prompts) != len(completions):
        raise ConfigError(
            "prompts and completions differ in number",
            got=(len(prompts), len(completions)),
            do="Pass one prompt for each completion.",
        )
    batch = _Batch(prompts, completions, columns or {})
    rows = len(completions)
    masked: dict[int, str] = {}
    values = [math.nan] * rows
    start = time.perf_counter()
    with infra.watch() as failures:
        try:
            checked = _evaluate(function, batch, find_row=on_invalid == "raise")
            masked = {row: value for row, value in enumerate(checked) if isinstance(value, str)}
            masked = {row: reason for row, reason in masked.items() if not skip_none or reason != _NONE}
            values = [math.nan if isinstance(value, str) else value for value in checked]
        except RewardError as error:
            if on_invalid == "raise" and not failures:
                raise
            masked = dict.fromkeys(range(rows), str(error))
    seconds = time.perf_counter() - start
    by_infra = {row: f.reason for f in failures for row in (range(rows) if f.row is None else [f.row])}
    unexplained = {row: reason for row, reason in masked.items() if row not in by_infra}
    if unexplained and on_invalid == "raise":
        _raise_invalid(function, prompts, unexplained)
    for row in by_infra:
        values[row] = math.nan
    return RewardColumn(name_of(function), values, {**masked, **by_infra}, len(by_infra), seconds)


@dataclass(frozen=True)
class _Batch:
    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Any]

    def row(self, number: int) -> _Batch:
        """One row as a batch; columns that are not one value a row are passed on as they are."""
        part = slice(number, number + 1)
        columns = {
            name: values[part] if hasattr(values, "__len__") and len(values) == len(self.completions) else values
            for name, values in self.columns.items()
        }
        return _Batch(self.prompts[part], self.completions[part], columns)


class _RaisedError(Exception):
    """The user's function raised the cause of this."""


def _evaluate(function: Callable[..., Any], batch: _Batch, *, find_row: bool) -> list[float | str]:
    """The function's values, each a finite number or what it is instead in words."""
    try:
        returned = _run(function, batch)
    except _RaisedError as raised:
        cause = raised.__cause__
        timed_out = isinstance(cause, TimeoutError)  # each row might take as long again
        row = _failing_row(function, batch, type(cause)) if find_row and not timed_out else None
        where = "" if row is None else f" for completion {row}, prompt {_short(batch.prompts[row])}"
        raise RewardError(
            f"reward {name_of(function)!r} raised {type(cause).__name__}{where}: {str(cause)[:200]}",
            do="Make it faster, raise reward_time_limit, or mask invalid rewards."
            if timed_out
            else "Let it return a number for every completion, whatever its text, or mask invalid rewards.",
        ) from cause
    return [_number(value) for value in _as_list(function, returned, len(batch.completions))]


def _run(function: Callable[..., Any], batch: _Batch) -> Any:
    """Call user code; whatever it raises but Ctrl-C becomes a :class:`_RaisedError`."""
    arguments = {**batch.columns, "prompts": batch.prompts, "completions": batch.completions}
    try:
        returned = function(**_accepted(function, arguments))
        return _wait_for(returned) if inspect.isawaitable(returned) else returned
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - user code; SystemExit in it must not end the run with code 0
        raise _RaisedError from error


def _failing_row(function: Callable[..., Any], batch: _Batch, kind: type) -> int | None:
    """The first row for which the function alone raises an error of this kind."""
    for number in range(len(batch.completions)):
        try:
            _run(function, batch.row(number))
        except _RaisedError as raised:
            if type(raised.__cause__) is kind:
                return number
        except RewardError:
            continue
    return None


def _raise_invalid(function: Callable[..., Any], prompts: Sequence[Any], masked: Mapping[int, str]) -> None:
    row, reason = next(iter(masked.items()))
    more = f" (and {len(masked) - 1} more such)" if len(masked) > 1 else ""
    raise RewardError(
        f"reward {name_of(function)!r} returned {reason} for completion {row}, prompt {_short(prompts[row])}{more}",
        do="Return a finite number for every completion, or mask invalid rewards.",
    )


def _as_list(function: Callable[..., Any], returned: Any, rows: int) -> list[Any]:
    if callable(getattr(returned, "tolist", None)):  # NumPy arrays, PyTorch tensors
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise RewardError(
            f"reward {name_of(function)!r} returned a {type(returned).__name__}",
            got=returned,
            do="Return a list with one number a completion.",
        )
    if len(returned) != rows:
        raise RewardError(
            f"reward {name_of(function)!r} returned {len(returned)} values for {rows} completions",
            do="Return a list with one number a completion, in their order.",
        )
    return list(returned)


def _number(value: Any) -> float | str:
    """The value as a float, or in words what it is instead."""
    if not isinstance(value, (bool, int, float)) and callable(getattr(value, "item", None)):
        value = value.item()  # NumPy scalars, tensors of one element
    if not isinstance(value, (bool, int, float)):
        return f"{type(value).__name__} {_short(value)}" if value is not None else _NONE
    try:
        number = float(value)
    except OverflowError:
        return "an integer beyond the range of floats"
    return number if math.isfinite(number) else str(number)


def _short(value: Any) -> str:
    try:
        text = text_of(value)
    except RewardError:
        text = repr(value)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function can take by name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return arguments
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _wait_for(awaitable: Any) -> Any:
    """The result of an asynchronous function, also where an event loop already runs in this thread (notebooks)."""
    results: list[Any] = []
    errors: list[BaseException] = []

    async def finish() -> Any:
        return await awaitable

    def work() -> None:
        try:
            results.append(asyncio.run(finish()))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=copy_context().run, args=(work,), name="async reward", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
