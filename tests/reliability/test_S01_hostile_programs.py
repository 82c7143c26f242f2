"""Programs that attack, and programs that only compute, each through the sandbox and through the documented helper."""

import math
import runpy
import socket
from pathlib import Path

import pytest

from unsloth.core.errors import SandboxError
from unsloth.rewards import (
    Rewards,
    SandboxConfig,
    SandboxedFunction,
    code_tests,
    create_locked_down_function,
    equal,
)

PROGRAMS = runpy.run_path(str(Path(__file__).with_name("hostile_programs.py")))["PROGRAMS"]
CHOSEN = [
    pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.soak)
    for number, name in enumerate(sorted(PROGRAMS))
]
CONFIG = SandboxConfig(seconds=0.3)
SECRET = "hf_nobodyMustSeeThis"
RIGHT = 7_305_918_264  # known to the host only

HONEST = {
    "closure": ("def add(a, b):\n    def adder(a):\n        return a + b\n    return adder(b) + b", [[1, 2], 6]),
    "stdlib": ("def f(x):\n    import math\n    from typing import Callable\n    return math.floor(x)", [[2.5], 2]),
    "recursion": ("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)", [[12], 144]),
    "helper": ("def f(x):\n    return g(x) + 1\n\ndef g(x):\n    return 2 * x", [[3], 7]),
    "lines": ("def f(text):\n    return [line.strip() for line in text.splitlines()]", [[" a\nb "], ["a", "b"]]),
    "deque": (
        "def f(edges):\n    from collections import deque, defaultdict\n    near = defaultdict(list)\n"
        "    for a, b in edges:\n        near[a].append(b)\n    seen, queue = {0}, deque([0])\n    while queue:\n"
        "        for b in near[queue.popleft()]:\n            if b not in seen:\n"
        "                seen.add(b)\n                queue.append(b)\n    return sorted(seen)",
        [[[[0, 1], [1, 2], [3, 4]]], [0, 1, 2]],
    ),
    "heap": ("def f(xs):\n    import heapq\n    return heapq.nsmallest(2, xs)", [[[5, 1, 4]], [1, 4]]),
    "class": (
        "def f(n):\n    class Counter:\n        def __init__(self):\n            self.n = 0\n"
        "        def add(self):\n            self.n += 1\n            return self\n    c = Counter()\n"
        "    for _ in range(n):\n        c.add()\n    return c.n",
        [[5], 5],
    ),
    "generator": ("def f(n):\n    def g():\n        yield from range(n)\n    return list(g())", [[3], [0, 1, 2]]),
    "cache": (
        "def f(n):\n    from functools import lru_cache\n    @lru_cache(None)\n    def p(i):\n"
        "        return 1 if i < 2 else p(i - 1) + p(i - 2)\n    return p(n)",
        [[80], 37889062373143906],
    ),
    "big_integer": (
        "def f(n):\n    import math\n    return math.factorial(n)",
        [[60], math.factorial(60)],
    ),
    "bytes": ("def f(b):\n    return b.decode('latin-1').encode('utf-8')", [[b"\xe4"], "ä".encode()]),
    "dictionary": ("def f(t):\n    return {c: t.count(c) for c in t}", [["abca"], {"a": 2, "b": 1, "c": 1}]),
    "catches": (
        "def f(x):\n    try:\n        return 1 / x\n    except ZeroDivisionError:\n        return None",
        [[0], None],
    ),
    "prints": ("def f(x):\n    print('debug', x)\n    return -x", [[4], -4]),
    "matrix": (
        "def matmul(A, B):\n    return [[sum(a * b for a, b in zip(r, c)) for c in zip(*B)] for r in A]",
        [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[19, 22], [43, 50]]],
    ),
    "dates": (
        "def f(s):\n    from datetime import datetime\n    return datetime.strptime(s, '%Y-%m-%d').weekday()",
        [["2024-02-29"], 3],
    ),
    "regex": ("def f(s):\n    import re\n    return re.findall(r'\\d+', s)", [["a1b22"], ["1", "22"]]),
    "dataclass": (
        "def f(x):\n    from dataclasses import dataclass\n    @dataclass\n"
        "    class P:\n        x: int\n    return P(x).x",
        [[9], 9],
    ),
    "walrus_match": (
        "def f(x):\n    match x:\n        case [a, *rest] if (n := len(rest)):\n            return a + n\n    return 0",
        [[[1, 2, 3]], 3],
    ),
}


@pytest.fixture
def bait(tmp_path, monkeypatch):
    """A secret in a file and in the environment, a file that must not appear, and a port that must stay quiet."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    readable = tmp_path / "secret.txt"
    readable.write_text(SECRET)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield tmp_path, readable, listener
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]
    assert readable.read_text() == SECRET
    assert readable.stat().st_mode & 0o777 != 0


def armed(name, bait):
    folder, readable, listener = bait
    source = PROGRAMS[name].replace("READ", str(readable)).replace("WRITE", str(folder / "made"))
    return source.replace("PORT", str(listener.getsockname()[1]))


def assert_harmless(outcome):
    assert outcome.status in ("ok", "error", "timeout", "killed")
    assert SECRET not in f"{outcome.value!r} {outcome.error!r} {outcome.output}"
    assert not equal(outcome.value, RIGHT)
    assert len(outcome.output) <= 64 << 10
    assert all(c.isprintable() or c in "\n\t\ufffd" or ord(c) >= 160 for c in f"{outcome.output}{outcome.error}")


@pytest.fixture(scope="module")
def honest():
    return create_locked_down_function("def square(x):\n    return x * x + 1")


@pytest.mark.parametrize("name", CHOSEN)
def test_no_program_gets_out(name, bait, honest):
    source = armed(name, bait)
    defined = SandboxedFunction.attempt(source, "f", config=CONFIG)
    assert_harmless(defined if defined.status != "ok" else defined.value.run(5))
    if defined.status == "ok" and not name.startswith("slow"):
        assert_harmless(defined.value.run(5))  # what the first call left behind must not help the second
    assert (defined.status == "timeout") == (name == "slow_definition")
    assert honest(6) == 37


@pytest.mark.parametrize("name", [p for p in CHOSEN if not p.values[0].startswith("slow")])
def test_no_program_gets_out_of_the_documented_helper(name, bait, honest):
    try:
        function = create_locked_down_function(armed(name, bait), config=CONFIG)
    except (SandboxError, SyntaxError):
        return
    assert_harmless(function.run(5))
    assert honest(7) == 50


@pytest.mark.parametrize("name", [name for name in sorted(PROGRAMS) if name.startswith("slow_loop")])
def test_what_does_not_end_is_ended(name):
    assert SandboxedFunction(PROGRAMS[name], "f", config=CONFIG).run(1).status == "timeout"


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_compute(name):
    source, (arguments, expected) = HONEST[name]
    function = create_locked_down_function(source)
    for _ in range(2):
        assert equal(function(*arguments), expected)


def test_the_reward_interface_scores_honest_programs_between_hostile_ones(bait):
    hostile = ["open_read", "os_exit", "spoof_reply", "eq_always_true", "slow_loop_in_c", "memory_list", "system_exit"]
    sources = [source for name in hostile for source in (armed(name, bait), "def f(x):\n    return x * 1000 + 7")]
    completions = [[{"role": "assistant", "content": f"Here:\n```python\n{source}\n```"}] for source in sources]
    prompts = [[{"role": "user", "content": "Compute."}]] * len(sources)
    rewards = Rewards([code_tests(config=CONFIG)])
    scores = rewards(prompts, completions, tests=[[[[5], 5007], [[6], 6007]]] * len(sources))
    assert scores[1::2] == [1.0] * len(hostile)
    assert scores[0::2] == [0.0] * len(hostile)
    assert rewards.statistics()["code_tests"].infra == 0


def test_a_forged_answer_does_not_reach_the_next_call():
    source = (
        "import sys\ndef f(x):\n    os = sys.modules['os']\n    if x == 0:\n"
        "        n = sys._getframe(1).f_locals['number']\n"
        '        for v in (1, 2):\n            body = (\'{"id":"%s","value":%d,"output":""}\' % (n, v)).encode()\n'
        "            os.write(0, len(body).to_bytes(4, 'big') + body)\n    return x + 100"
    )
    function = SandboxedFunction(source, "f")
    assert function.run(0).value == 1  # no better than returning 1
    assert [function(x) for x in (1, 2, 3)] == [101, 102, 103]
