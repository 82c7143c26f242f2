import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from unsloth import create_locked_down_function, execute_with_time_limit
from unsloth.core.errors import ConfigError, SandboxTimeoutError
from unsloth.rewards import SandboxConfig, SandboxedFunction


def in_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def here(function, *arguments):
    return function(*arguments)


ANYWHERE = pytest.mark.parametrize("run", [here, in_thread], ids=["main thread", "another thread"])


def spin():
    while True:
        pass


@ANYWHERE
def test_a_host_loop_is_interrupted(run):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="spin took longer than 0.2 seconds"):
        run(execute_with_time_limit(0.2)(spin))
    assert time.monotonic() - start < 5


@ANYWHERE
def test_a_function_within_its_limit_is_left_alone(run):
    @execute_with_time_limit(5)
    def add(a, *, b):
        """Adds."""
        return a + b

    assert run(lambda: add(1, b=2)) == 3
    assert add.__name__ == "add" and add.__doc__ == "Adds."
    with pytest.raises(KeyError):
        run(execute_with_time_limit(5)(lambda: {}["x"]))


@ANYWHERE
def test_generated_calls_in_the_loop_are_cut_off_and_their_process_ended(run):
    function = create_locked_down_function("def f(x):\n    return sum(range(x))")

    @execute_with_time_limit(0.3)
    def play():
        return [function(x) for x in (10, 20, 10**13)]

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        run(play)
    assert time.monotonic() - start < 4  # the function's own limit is 5 seconds
    assert function(10) == 45


def test_after_the_limit_generated_calls_fail_at_once_even_if_the_host_swallows_errors():
    function = SandboxedFunction("def f(x):\n    return x", config=SandboxConfig(seconds=5))
    statuses = []

    @execute_with_time_limit(0.2)
    def stubborn():
        with contextlib.suppress(TimeoutError):
            spin()
        statuses.extend(function.run(1).status for _ in range(3))

    with pytest.raises(TimeoutError):
        stubborn()
    assert statuses == ["timeout"] * 3
    assert function(1) == 1


@ANYWHERE
def test_limits_nest_and_the_inner_one_may_be_caught(run):
    inner = execute_with_time_limit(0.1)(spin)

    @execute_with_time_limit(20)
    def outer():
        try:
            inner()
        except TimeoutError as error:
            return str(error)

    assert run(outer).startswith("spin took longer than 0.1")

    @execute_with_time_limit(0.1)
    def short():
        execute_with_time_limit(20)(spin)()

    with pytest.raises(TimeoutError):
        run(short)


def test_an_earlier_timer_keeps_its_time_and_handler():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    left_before = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeoutError):
            execute_with_time_limit(0.1)(spin)()
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.25
        with pytest.raises(TimeoutError):  # now the other timer is the earlier one
            execute_with_time_limit(0.5)(spin)()
        assert len(rung) == 1 and 0.25 < rung[0] - start < 0.55
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left_before)


def test_no_thread_and_no_late_exception_is_left():
    def work():
        for _ in range(50):
            with pytest.raises(TimeoutError):
                execute_with_time_limit(0.002)(spin)()
            sum(range(1000))
        return True

    assert in_thread(work)
    assert [thread for thread in threading.enumerate() if thread.name == "time limit"] == []


def test_a_host_call_that_could_not_be_interrupted_still_counts_as_too_long():
    @execute_with_time_limit(0.05)
    def busy():
        return sum(range(10**7))  # one call into C

    with pytest.raises(SandboxTimeoutError):
        in_thread(busy)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_impossible_limits_are_refused(seconds):
    with pytest.raises(ConfigError, match="time limit"):
        execute_with_time_limit(seconds)


def test_asynchronous_functions_and_generators_are_refused():
    async def later():
        return 1

    def many():
        yield 1

    for function in (later, many):
        with pytest.raises(ConfigError, match="runs after it has returned"):
            execute_with_time_limit(1)(function)
