"""Call one reward function and get finite numbers, or an error that says which function, which prompt, which value."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Literal

from unsloth.core.errors import ConfigError, RewardError, SandboxUnavailableError, UnslothError
from unsloth.rewards import infra
from unsloth.rewards.completions import text_of

OnInvalid = Literal["raise", "mask"]


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


def call_reward(
    function: Callable[..., Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any] | None = None,
    *,
    on_invalid: OnInvalid = "raise",
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

    Raises:
        RewardError: The function raised, or a value is None, NaN, infinite or not a number, or there are too many or
            too few of them.
    """
    if on_invalid not in ("raise", "mask"):
        raise ConfigError("unknown on_invalid", got=on_invalid, do='Use "raise" or "mask".')
    rows = len(completions)
    arguments = _accepted(function, {**(columns or {}), "prompts": prompts, "completions": completions})
    masked: dict[int, str] = {}
    start = time.perf_counter()
    values = [math.nan] * rows
    with infra.watch() as failures:
        try:
            returned = _run(function, arguments)
            checked = [_number(value) for value in _as_list(function, returned, rows)]
            values = [math.nan if isinstance(value, str) else value for value in checked]
            masked = {row: value for row, value in enumerate(checked) if isinstance(value, str)}
            if masked and on_invalid == "raise":
                _raise_invalid(function, prompts, masked)
        except RewardError as error:
            if on_invalid == "raise" and not failures:
                raise
            masked = dict.fromkeys(range(rows), str(error))
            values = [math.nan] * rows
    seconds = time.perf_counter() - start
    by_infra = {row: f.reason for f in failures for row in (range(rows) if f.row is None else [f.row])}
    for row in by_infra:
        values[row] = math.nan
    return RewardColumn(name_of(function), values, {**masked, **by_infra}, len(by_infra), seconds)


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call user code; whatever it raises but Ctrl-C becomes a :class:`RewardError`."""
    try:
        returned = function(**arguments)
        return _wait_for(returned) if inspect.isawaitable(returned) else returned
    except SandboxUnavailableError as error:  # recorded where it arose: masked, not raised
        raise RewardError(f"reward {name_of(function)!r} had no sandbox") from error
    except (UnslothError, KeyboardInterrupt) as error:
        if isinstance(error, RewardError) or not isinstance(error, UnslothError):
            raise
        raise _raised(function, arguments, error) from error
    except BaseException as error:  # noqa: BLE001 - user code; SystemExit in it must not end the run with code 0
        raise _raised(function, arguments, error) from error


def _raised(function: Callable[..., Any], arguments: dict[str, Any], error: BaseException) -> RewardError:
    prompts = arguments.get("prompts") or []
    shown = f" (the first prompt of the batch: {_short(prompts[0])})" if len(prompts) else ""
    return RewardError(
        f"reward {name_of(function)!r} raised {type(error).__name__}: {str(error)[:200]}{shown}",
        do="Let it return a number for every completion, whatever its text, or mask invalid rewards.",
    )


def _raise_invalid(function: Callable[..., Any], prompts: Sequence[Any], masked: Mapping[int, str]) -> None:
    row, reason = next(iter(masked.items()))
    more = f" and {len(masked) - 1} more" if len(masked) > 1 else ""
    prompt = _short(prompts[row]) if row < len(prompts) else "unknown"
    raise RewardError(
        f"reward {name_of(function)!r} returned {reason} for completion {row}{more}, prompt {prompt}",
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
        return f"{type(value).__name__} {_short(value)}" if value is not None else "None"
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
