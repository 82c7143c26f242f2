"""Rewards for generated code: taken from the completion, run in a sandbox on arguments, compared in the host."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from unsloth.core.errors import ConfigError
from unsloth.rewards import infra
from unsloth.rewards.completions import Reward, column_of, from_text, named, text_of
from unsloth.rewards.sandbox import SandboxConfig, SandboxedFunction
from unsloth.rewards.source_check import check_python_modules

_FENCE = "```"


def extract_code(text: str) -> str | None:
    """The last whole block between triple backticks, without its language; None without one."""
    parts = text.split(_FENCE)
    if len(parts) < 3:
        return None
    block = parts[len(parts) - 2 if len(parts) % 2 else len(parts) - 3]
    first, line_break, rest = block.partition("\n")
    return (rest if line_break and first.strip().lower() in ("python", "py", "python3", "") else block).strip()


def equal(value: Any, expected: Any, *, relative: float = 1e-9) -> bool:
    """Whether two plain values are the same, of the same types throughout, floats within ``relative``.

    A whole number may stand for an equal float, and a list for a tuple, as after JSON; ``True`` is not 1.
    """
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None or value is None:
        return type(value) is type(expected) and value == expected
    if isinstance(expected, (int, float)) and isinstance(value, (int, float)):
        return _equal_numbers(value, expected, relative)
    if isinstance(expected, (list, tuple)) and isinstance(value, (list, tuple)):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(equal(a, b, relative=relative) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(value, dict):
        same_keys = value.keys() == expected.keys()
        return same_keys and all(equal(value[key], expected[key], relative=relative) for key in expected)
    return type(value) is type(expected) and bool(value == expected)


def _equal_numbers(value: float, expected: float, relative: float) -> bool:
    if isinstance(value, int) and isinstance(expected, int):
        return value == expected
    try:
        close = math.isclose(value, expected, rel_tol=relative, abs_tol=relative)
    except OverflowError:  # an integer beyond the range of floats
        return False
    return close or (math.isnan(value) and math.isnan(expected))


def code_tests(
    column: str = "tests",
    *,
    reward: float = 1.0,
    no_code: float = -1.0,
    broken: float = -0.5,
    name: str | None = None,
    extract: Callable[[str], str | None] = extract_code,
    config: SandboxConfig | None = None,
    workers: int = 4,
) -> Reward:
    """``reward`` times the share of tests that the completion's function passes.

    The row's ``column`` is a list of ``[arguments, expected]``. Only the arguments go into the sandbox; results are
    compared in the host by :func:`equal`. A test that fails or raises counts as not passed; one that takes too long or
    ends the process does so for itself and all that follow.

    Args:
        column: Column of the data set with the tests.
        reward: For passing all.
        no_code: Without a block of code.
        broken: For code that cannot be defined.
        name: The function to call; by default the first that no other one uses.
        extract: Takes the code from a completion's text.
        config: Limits of the sandbox.
        workers: Completions that are tested at the same time.

    Raises:
        ConfigError: When called: a row has no tests, or not in that form.
    """

    def score(text: str, tests: Any, row: int) -> float:
        source = extract(text)
        pairs = _pairs(tests, column)
        if source is None:
            return no_code
        with infra.watch() as failures:
            share = _share_passed(source, name, config, pairs)
        if failures:
            infra.record(failures[0].reason, row)
            return math.nan
        return broken if share is None else reward * share

    def code_tests_reward(prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float]:
        tests = column_of("code_tests", columns, column, len(completions))
        with ThreadPoolExecutor(max(1, min(workers, len(completions) or 1))) as pool:
            futures = [
                pool.submit(copy_context().run, score, text_of(completion), tests[row], row)
                for row, completion in enumerate(completions)
            ]
            return [future.result() for future in futures]

    return named(code_tests_reward, "code_tests")


def standard_imports_only(
    *,
    reward: float = 1.0,
    otherwise: float = -20.0,
    no_code: float = -1.0,
    extract: Callable[[str], str | None] = extract_code,
) -> Reward:
    """``reward`` if the completion's code imports Python's own modules only (:func:`check_python_modules`)."""

    def score(text: str) -> float:
        source = extract(text)
        if source is None:
            return no_code
        return reward if check_python_modules(source)[0] else otherwise

    return from_text("standard_imports_only", score)


def _share_passed(
    source: str, name: str | None, config: SandboxConfig | None, pairs: Sequence[tuple[Sequence[Any], Any]]
) -> float | None:
    """The share of tests passed, or None if the source cannot be defined."""
    defined = SandboxedFunction.attempt(source, name, config=config)
    if defined.status != "ok":
        return None
    passed = 0
    for arguments, expected in pairs:
        outcome = defined.value.run(*arguments)
        if outcome.status in ("timeout", "killed", "infra"):
            break
        passed += outcome.status == "ok" and equal(outcome.value, expected)
    defined.value.close()
    return passed / len(pairs)


def _pairs(tests: Any, column: str) -> list[tuple[Sequence[Any], Any]]:
    """The tests as (arguments, expected); data sets often hold them as JSON text."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            tests = None
    valid = isinstance(tests, (list, tuple)) and all(
        isinstance(test, (list, tuple)) and len(test) == 2 and isinstance(test[0], (list, tuple)) for test in tests
    )
    if not tests or not valid:
        raise ConfigError(
            f"column {column!r} must hold tests", got=tests, do="Give each row a list of [[arguments ...], expected]."
        )
    return [(arguments, expected) for arguments, expected in tests]
