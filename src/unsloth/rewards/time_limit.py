"""A wall-clock limit around a function of the host, and around the generated code that it calls."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from unsloth.core.errors import ConfigError, SandboxTimeoutError

P = ParamSpec("P")
R = TypeVar("R")

_POLL_SECONDS = 0.005


class _Limit:
    """A limit that is running: when it ends, and how many blocks there are that it must not interrupt."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.shields = 0


_LIMITS: ContextVar[tuple[_Limit, ...]] = ContextVar("limits", default=())


class _LimitPassed(TimeoutError):  # noqa: N818 - an interruption that the wrapper turns into the public error
    """Raised in the middle of the host's function."""


def deadline() -> float:
    """When the innermost limit that is running ends, as :func:`time.monotonic` counts; infinity without one."""
    return min((limit.end for limit in _LIMITS.get()), default=math.inf)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A block that keeps to :func:`deadline` by itself and is not interrupted; limits that end in it act afterwards."""
    limits = _LIMITS.get()
    for limit in limits:
        limit.shields += 1
    try:
        yield
    finally:
        for limit in limits:
            limit.shields -= 1


def execute_with_time_limit(seconds: float) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a host function, such as a loop that plays a whole game, so that it ends after ``seconds``.

    The limit covers everything the function does. Calls of sandboxed functions in it are cut off, and their process
    ended, when the limit passes; later ones fail at once. The host's own code is interrupted by a timer signal in the
    main thread, and by an asynchronous exception in other threads (and where there are no timer signals). Limits
    nest; a timer that was running before goes on afterwards.

    Not covered: host code inside a C function that does not return (in a thread also ``time.sleep`` and waiting for
    the network), which is interrupted when it does; host code that catches the exception and goes on without calling
    a sandboxed function; threads started by the function. Generated code never runs in the host, so none of this is
    in its hands.

    Args:
        seconds: Wall-clock time from the call on, above 0.

    Raises:
        ConfigError: ``seconds`` is not a positive number, or the function is asynchronous or a generator.
        SandboxTimeoutError: From the decorated function: the limit has passed. It is a ``TimeoutError``.
    """
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds < math.inf:
        raise ConfigError("the time limit must be a positive number of seconds", got=seconds, do="Pass e.g. 2.")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigError(
                "a time limit around a function that runs after it has returned",
                got=function,
                do="Decorate the plain function that does the work.",
            )

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            limit = _Limit(min(deadline(), time.monotonic() + seconds))
            token = _LIMITS.set((*_LIMITS.get(), limit))
            try:
                with _interrupted_by(limit):
                    result = function(*args, **kwargs)
            except _LimitPassed:
                raise _too_long(function, seconds) from None
            finally:
                _LIMITS.reset(token)
            if time.monotonic() > limit.end:
                raise _too_long(function, seconds)
            return result

        return limited

    return decorate


def _too_long(function: Callable[..., Any], seconds: float) -> SandboxTimeoutError:
    return SandboxTimeoutError(
        f"{getattr(function, '__name__', 'the function')} took longer than {seconds:g} seconds",
        do="Score it as too slow, or raise the limit.",
    )


@contextlib.contextmanager
def _interrupted_by(limit: _Limit) -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    with _alarm(limit) if in_main and hasattr(signal, "setitimer") else _watchdog(limit):
        yield


@contextlib.contextmanager
def _alarm(limit: _Limit) -> Iterator[None]:
    """Raise in this, the main, thread by SIGALRM; a timer of someone else keeps its time."""
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    other = time.monotonic() + left if left else math.inf

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal other
        if time.monotonic() >= limit.end:
            if not limit.shields:
                raise _LimitPassed
            signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS)
            return
        # the timer from outside was the earlier one
        other = time.monotonic() + interval if interval else math.inf
        signal.setitimer(signal.ITIMER_REAL, max(min(limit.end, other) - time.monotonic(), 1e-6))
        if callable(previous):
            previous(number, frame)

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(min(limit.end, other) - time.monotonic(), 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
        if other < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(other - time.monotonic(), 1e-6), interval)


@contextlib.contextmanager
def _watchdog(limit: _Limit) -> Iterator[None]:
    """Raise in this thread from another one, between two of its bytecodes."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    over = threading.Event()
    guard = threading.Lock()

    def watch() -> None:
        pause = max(limit.end - time.monotonic(), 0.0)
        while not over.wait(pause):
            pause = _POLL_SECONDS
            with guard:
                if not limit.shields and not over.is_set():
                    raise_in(thread, ctypes.py_object(_LimitPassed))
                    return

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with guard:
            over.set()
            raise_in(thread, None)  # one that was sent but has not arrived
        watcher.join()
