"""The sandbox itself fails: told apart from the generated code's faults, masked, and the run stops after some."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unsloth.core.errors import SandboxUnavailableError
from unsloth.rewards import Rewards, SandboxConfig, SandboxedFunction, call_reward, code_tests

GOOD = "```python\ndef f(x):\n    return x + 1\n```"
TESTS = [[[1], 2]]


@pytest.fixture
def no_python(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")


def test_a_process_that_cannot_start_is_no_fault_of_the_code(no_python):
    outcome = SandboxedFunction.attempt("def f(x):\n    return x")
    assert outcome.status == "infra"
    with pytest.raises(SandboxUnavailableError, match="did not start.*No such file"):
        outcome.unwrap()


def test_its_rows_are_masked_and_counted_and_the_run_stops_in_the_end(no_python):
    rewards = Rewards([code_tests(), lambda completions, **_: [1.0] * len(completions)], max_infra=3)
    for _ in range(2):
        batch = rewards.score(["p", "p"], [GOOD, GOOD], tests=[TESTS, TESTS])
        assert batch.masked == [True, True] and all(math.isnan(value) for value in batch.total)
    with pytest.raises(SandboxUnavailableError, match="3 batches in a row"):
        rewards.score(["p"], [GOOD], tests=[TESTS])
    assert rewards.statistics()["code_tests"].infra == 5


def test_only_the_rows_concerned_are_masked(monkeypatch):
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    reward = code_tests(workers=1)

    def repair_after_first(prompts, completions, tests):
        first = reward(prompts[:1], completions[:1], tests=tests[:1])
        monkeypatch.setattr(sys, "executable", python)
        return first + reward(prompts[1:], completions[1:], tests=tests[1:])

    column = call_reward(repair_after_first, ["p", "q"], [GOOD, GOOD], {"tests": [TESTS, TESTS]})
    assert math.isnan(column.values[0]) and column.values[1] == 1.0 and list(column.masked) == [0]


def test_a_success_between_failures_resets_the_count(monkeypatch):
    python = sys.executable
    rewards = Rewards([code_tests()], max_infra=2)
    for executable in ("/nonexistent", python, "/nonexistent", python):
        monkeypatch.setattr(sys, "executable", executable)
        rewards.score(["p"], [GOOD], tests=[TESTS])
    assert rewards.statistics()["code_tests"].infra == 2


def inner_process(function):
    outer = function._child.identity
    return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_process_killed_from_outside_is_infra_and_the_next_call_works():
    function = SandboxedFunction(
        "import time\ndef f(x):\n    time.sleep(x)\n    return x", config=SandboxConfig(seconds=20)
    )
    victim = inner_process(function)
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    outcome = function.run(15)
    assert outcome.status == "infra" and "killed from outside" in str(outcome.error)
    assert function.run(0).value == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_process_killed_between_calls_costs_nothing():
    function = SandboxedFunction("def f(x):\n    return x + 1")
    os.kill(inner_process(function), signal.SIGKILL)
    time.sleep(0.1)
    assert function.run(1).value == 2


def test_the_sandbox_ends_with_the_host():
    code = (
        "import os\nfrom unsloth.rewards import SandboxedFunction\n"
        "f = SandboxedFunction('def f():\\n    while True: pass')\n"
        "print(f._child.identity, flush=True)\nimport threading\nthreading.Timer(0.3, os._exit, (0,)).start()\nf()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    outer = int(result.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{outer}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{outer}/stat").read_text().split(") ")[1][0] == "Z":
            break  # dead; whoever adopts orphans here has not asked yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{outer}").exists()
