"""Reward functions and generated code that print, wait, raise or leave: the host goes on and its exit code is right."""

import math
import subprocess
import sys
import time

import pytest

from unsloth.core.errors import RewardError
from unsloth.rewards import (
    Rewards,
    SandboxConfig,
    SandboxedFunction,
    call_reward,
    code_tests,
    execute_with_time_limit,
)


def test_printed_text_is_kept_up_to_the_limit():
    function = SandboxedFunction("def f(n):\n    for _ in range(n):\n        print('a' * 999)\n    return n")
    outcome = function.run(200)
    assert outcome.value == 200 and len(outcome.output) == 64 << 10
    assert function.run(1).output == "a" * 999 + "\n"  # and not what the call before printed


@pytest.mark.parametrize(
    "error", [BaseException("out"), SystemExit(0), GeneratorExit(), ValueError("x"), MemoryError()]
)
def test_whatever_a_reward_function_raises_is_a_typed_error(error):
    def picky(completions, **columns):
        if "bad" in completions:
            raise error
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=rf"'picky' raised {type(error).__name__} for completion 1, prompt 'second'"):
        call_reward(picky, ["first", "second"], ["good", "bad"])
    masked = call_reward(picky, ["first", "second"], ["good", "bad"], on_invalid="mask")
    assert all(math.isnan(value) for value in masked.values) and masked.infra == 0


def test_interrupting_the_run_still_interrupts_it():
    def interrupted(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward(interrupted, ["p"], ["c"])


def test_an_exit_in_a_reward_function_does_not_end_the_run_with_code_0():
    code = (
        "import sys\nfrom unsloth.rewards import Rewards\n"
        "def leave(completions, **columns):\n    sys.exit(0)\nRewards([leave])(['p'], ['c'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "'leave' raised SystemExit" in result.stderr


def test_a_slow_reward_function_is_cut_off():
    @execute_with_time_limit(0.2)
    def slow(completions, **columns):
        time.sleep(30)
        return [0.0] * len(completions)

    start = time.monotonic()
    with pytest.raises(RewardError, match="slow took longer than 0.2 seconds"):
        Rewards([slow])(["p"], ["c"])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.modules['os']._exit(0)",
        "raise BaseException",
        "import sys; sys.modules['_thread'].start_new_thread(print, ())",
        "import time; time.sleep(100)",
        "while True: print('a' * 10000)",
    ],
)
def test_generated_code_that_does_so_fails_and_only_itself(body):
    bad = f"```python\ndef f(x):\n    {body}\n    return x\n```"
    good = "```python\ndef f(x):\n    return x\n```"
    reward = code_tests(config=SandboxConfig(seconds=0.3))
    column = call_reward(reward, ["p"] * 3, [good, bad, good], {"tests": [[[[4], 4]]] * 3})
    assert column.values == [1.0, 0.0, 1.0] and not column.masked
