"""Checks against generated functions that win by other means than doing the work.

Models learn to call optimized libraries, to remember results between calls, to read the answer from global variables,
and to change the clock. Here the libraries, the globals and the host's clock are out of reach to begin with; what
remains is to see whether a function remembers, and to time it with arguments that it has not met.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unsloth.core.errors import ConfigError, GeneratedCodeError
from unsloth.rewards.code_answer import equal, extract_code
from unsloth.rewards.completions import Reward, from_text
from unsloth.rewards.sandbox import SandboxedFunction
from unsloth.rewards.source_check import parse, refuse_globals

_REMEMBERED = 10.0  # a repeated call this many times faster was not computed again
_MEASURABLE_SECONDS = 0.002


@dataclass(frozen=True)
class Timing:
    """Time of calls by the host's clock.

    Attributes:
        seconds: Median of a call, without ``overhead``.
        fastest: The shortest.
        rounds: How many calls.
        overhead: Seconds that sending the same arguments to a function that does nothing takes.
    """

    seconds: float
    fastest: float
    rounds: int
    overhead: float


def time_calls(
    function: SandboxedFunction,
    make_arguments: Callable[[int], Sequence[Any]],
    *,
    rounds: int = 5,
    check: Callable[[Sequence[Any], Any], bool] | None = None,
    wipe_bytes: int = 64 << 20,
) -> Timing:
    """Time a generated function so that neither remembering nor changing a clock helps.

    Each round has arguments of its own, a process of its own, and a walk over ``wipe_bytes`` of other memory before
    it, so that nothing useful is left in the processor's caches. The clock is the host's.

    Args:
        function: What to time.
        make_arguments: Round number → the positional arguments; make them differ.
        rounds: Number of calls.
        check: ``(arguments, value) -> bool``: whether the result is right; compare in the host.
        wipe_bytes: Memory to walk over; 0 for none.

    Raises:
        GeneratedCodeError: A result is wrong.
        Exception: Whatever a call raised, as calling the function does.
    """
    if rounds < 1:
        raise ConfigError("rounds of a timing", got=rounds, do="Pass 1 or more.")
    idle = SandboxedFunction("def idle(*arguments):\n    return None\n", config=function.config)
    wipe = bytearray(wipe_bytes)
    times, overheads = [], []
    for number in range(rounds):
        arguments = make_arguments(number)
        overheads.append(_timed(idle, arguments)[0])
        function.restart()
        function.ready().unwrap()
        for position in range(0, wipe_bytes, 64):
            wipe[position] = number & 255
        seconds, value = _timed(function, arguments)
        if check is not None and not check(arguments, value):
            raise GeneratedCodeError(f"{function.__name__} gave a wrong result when timed", do="Score it as wrong.")
        times.append(seconds)
    idle.close()
    overhead = min(overheads)
    return Timing(
        max(statistics.median(times) - overhead, 0.0), max(min(times) - overhead, 0.0), rounds, overhead=overhead
    )


def find_memory(function: SandboxedFunction, calls: Sequence[Sequence[Any]]) -> list[str]:
    """Look for results that depend on earlier calls, or are kept from them.

    Args:
        function: What to look at.
        calls: Two or more lists of positional arguments.

    Returns:
        One sentence a finding, none if all is well: results that differ between two new processes (chance), results
        that differ after other calls (state), and repeated calls that are ten times faster (a cache). A cache is only
        seen if the call takes 2 ms or more.

    Raises:
        Exception: Whatever a call raised, as calling the function does.
    """
    findings = []
    alone = [_alone(function, arguments) for arguments in calls]
    again = [_alone(function, arguments) for arguments in calls]
    by_chance = [not equal(first, second) for first, second in zip(alone, again, strict=True)]
    function.restart()
    function.ready().unwrap()
    for number, arguments in enumerate(calls):
        first, value = _timed(function, arguments)
        second, repeated = _repeat(function, arguments)
        if by_chance[number]:
            findings.append(f"call {number}: two new processes give different results")
        elif not (equal(value, alone[number]) and equal(repeated, alone[number])):
            findings.append(f"call {number}: the result is another one after earlier calls")
        if _is_quicker(first, second) and _stays_quicker(function, arguments):
            findings.append(f"call {number}: repeated, it takes {second * 1e3:.2f} instead of {first * 1e3:.2f} ms")
    return findings


def _is_quicker(first: float, second: float) -> bool:
    return first >= _MEASURABLE_SECONDS and second * _REMEMBERED <= first


def _stays_quicker(function: SandboxedFunction, arguments: Sequence[Any]) -> bool:
    """Whether a repeated call is quicker in two further processes too: a busy machine slows single calls by chance."""
    for _ in range(2):
        function.restart()
        function.ready().unwrap()
        if not _is_quicker(_timed(function, arguments)[0], _repeat(function, arguments)[0]):
            return False
    return True


def _repeat(function: SandboxedFunction, arguments: Sequence[Any]) -> tuple[float, Any]:
    """The least time of three calls, which a busy machine can only add to, and the first one's value."""
    first, *others = [_timed(function, arguments) for _ in range(3)]
    return min(first[0], *(seconds for seconds, _ in others)), first[1]


def no_globals(
    *,
    reward: float = 1.0,
    otherwise: float = -20.0,
    no_code: float = -1.0,
    extract: Callable[[str], str | None] = extract_code,
) -> Reward:
    """``reward`` if the completion's code uses no globals and only modules that the sandbox has.

    The same filter as :func:`unsloth.create_locked_down_function`; nothing is run.
    """

    def score(text: str) -> float:
        source = extract(text)
        if source is None:
            return no_code
        try:
            refuse_globals(source, parse(source))
        except (SyntaxError, GeneratedCodeError):
            return otherwise
        return reward

    return from_text("no_globals", score)


def _alone(function: SandboxedFunction, arguments: Sequence[Any]) -> Any:
    function.restart()
    return function(*arguments)


def _timed(function: SandboxedFunction, arguments: Sequence[Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    outcome = function.run(*arguments)
    return time.perf_counter() - start, outcome.unwrap()
