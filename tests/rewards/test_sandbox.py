import gc
import json
import os
from enum import IntEnum

import numpy as np
import pytest
import torch

from unsloth.core.errors import GeneratedCodeError, SandboxKilledError, SandboxTimeoutError
from unsloth.rewards import SandboxConfig, SandboxedFunction
from unsloth.rewards.child import codec


@pytest.fixture(scope="module")
def echo():
    return SandboxedFunction("def f(x):\n    return x")


VALUES = [
    None, True, False, 0, -1, 2**53 + 1, 2**61 - 1, -(2**61), 7**400, 0.1, -0.0, 1e308, float("inf"), "",
    "ä\ud800\n\"\\",     b"\x00\xff", [], [1, 2.5], [1, True, None, "a"], (), (1, (2, [3])), {1, 2}, frozenset({"a"}),
    {},
    {"a": [1], 2: None, (1, "x"): b"", None: {3: 4}, 2.5: True}, [[]], [2**70, 1.5], [float("inf"), 1], {"t": [1]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_go_in_and_come_back_the_same(echo, value):
    back = echo(value)
    assert back == value and type(back) is type(value)
    assert repr(back) == repr(value)  # and the types within


def test_nan_comes_back(echo):
    assert echo([float("nan"), 1.0])[0] != echo(0.0)


def test_subclasses_and_arrays_arrive_as_plain_values(echo):
    class Number(IntEnum):
        ONE = 1

    class Row(list):
        pass

    given = [np.arange(3), np.float32(0.5), torch.eye(2), Number.ONE, Row([1]), np.int64(3), bytearray(b"a")]
    assert repr(echo(given)) == repr([[0, 1, 2], 0.5, [[1.0, 0.0], [0.0, 1.0]], 1, [1], 3, b"a"])


@pytest.mark.parametrize("value", [object(), len, 1j, {"a": object()}], ids=["object", "function", "complex", "inside"])
def test_other_arguments_are_refused_before_anything_is_sent(echo, value):
    with pytest.raises(TypeError, match="must be plain data"):
        echo(value)
    assert echo(1) == 1


def test_arguments_are_copies():
    function = SandboxedFunction("def f(x):\n    x.append(1)\n    return x")
    given = [0]
    assert function(given) == [0, 1] and given == [0]


ERRORS = [
    ("1 / 0", ZeroDivisionError, "division by zero"),
    ("{}['k']", KeyError, "k"),
    ("[][1]", IndexError, "list index out of range"),
    ("int('x')", ValueError, "invalid literal"),
    ("None.x", AttributeError, "'NoneType' object has no attribute 'x'"),
    ("next(iter([]))", RuntimeError, "generated code raised StopIteration"),
    ("b'\\xff'.decode()", UnicodeDecodeError, "invalid start byte"),
    ("'\\xff'.encode('ascii')", UnicodeEncodeError, "ordinal not in range"),
    ("open('x')", PermissionError, "not permitted"),
    ("__import__('numpy')", ModuleNotFoundError, "No module named 'numpy'"),
    ("(_ for _ in ()).throw(AssertionError('no'))", AssertionError, "no"),
    ("(_ for _ in ()).throw(TimeoutError('t'))", TimeoutError, "t"),
    ("eval('(')", SyntaxError, "never closed"),
    ("f(x)", RecursionError, "maximum recursion depth"),
    ("'a' * (1 << 40)", MemoryError, ""),
]


@pytest.mark.parametrize(("expression", "kind", "text"), ERRORS, ids=[kind.__name__ for _, kind, _ in ERRORS])
def test_errors_arrive_as_their_builtin_types(expression, kind, text):
    function = SandboxedFunction(f"def f(x):\n    return {expression}")
    with pytest.raises(kind) as caught:
        function(1)
    assert type(caught.value) is kind and text in str(caught.value)
    assert caught.value.__notes__ == ["raised by generated code in its sandbox"]
    assert function.run(1).status == "error"


def test_no_error_ends_a_loop_of_the_host():
    function = SandboxedFunction("def f(x):\n    raise StopIteration")
    with pytest.raises(RuntimeError):
        all(map(function, range(3)))


def test_own_errors_arrive_as_the_builtin_that_they_are():
    source = "class Mine(KeyError):\n    pass\ndef f(x):\n    raise Mine('m')"
    with pytest.raises(KeyError, match="m") as caught:
        SandboxedFunction(source, "f")(1)
    assert type(caught.value) is KeyError


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"])
def test_errors_that_would_end_the_host_do_not_arrive_as_such(name):
    with pytest.raises(GeneratedCodeError, match=f"raised {name}"):
        SandboxedFunction(f"def f():\n    raise {name}")()


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [
        ("def f():\n    while True: pass", "timeout", SandboxTimeoutError),
        ("import sys\ndef f():\n    sys.modules['os']._exit(3)", "killed", SandboxKilledError),
        ("def f():\n    return 'a' * 2_000_000", "error", GeneratedCodeError),
        ("def f():\n    return f", "error", TypeError),
    ],
)
def test_every_failure_has_its_status_and_error(source, status, error):
    function = SandboxedFunction(source, "f", config=SandboxConfig(seconds=0.5))
    outcome = function.run()
    assert outcome.status == status and type(outcome.error) is error and outcome.value is None
    with pytest.raises(error):
        outcome.unwrap()


def test_a_new_process_after_a_failure_and_after_restart():
    source = "def f(x, seen=[]):\n    seen.append(x)\n    while x < 0: pass\n    return len(seen)"
    function = SandboxedFunction(source, config=SandboxConfig(seconds=0.3))
    assert [function(1), function(1)] == [1, 2]
    assert function.run(-1).status == "timeout"
    assert function(1) == 1
    function.restart()
    assert function(1) == 1


def test_a_process_is_replaced_before_its_processor_time_is_used_up():
    source = "def f(x, seen=[]):\n    seen.append(x)\n    import time\n    time.sleep(x)\n    return len(seen)"
    function = SandboxedFunction(source, config=SandboxConfig(seconds=0.9, cpu_seconds=1))
    assert function(0.3) == 1
    assert function(0) == 1  # more than 0.1 of the second is gone: a call might not get its 0.9


def test_definition_errors():
    with pytest.raises(ZeroDivisionError):
        SandboxedFunction("def f(x=1 / 0):\n    return x")
    with pytest.raises(SandboxTimeoutError):
        SandboxedFunction("while True:\n    pass\ndef f():\n    pass", config=SandboxConfig(seconds=0.2))
    with pytest.raises(GeneratedCodeError, match="g is not a function"):
        SandboxedFunction("def f():\n    pass\ng = 3", "g")
    with pytest.raises(GeneratedCodeError, match="h is not a function"):
        SandboxedFunction("def f():\n    pass", "h")
    assert SandboxedFunction.attempt("def f(").status == "error"
    assert SandboxedFunction.attempt("x = 1").status == "error"


def test_whole_programs_may_have_globals_classes_and_imports():
    source = (
        "import math\nfrom collections import Counter\nLIMIT = 3\nclass P:\n    def go(self):\n        return LIMIT\n"
        "square = lambda x: x * x\ndef f(x):\n    return [math.gcd(12, x), Counter('aab')['a'], P().go(), square(x)]"
    )
    assert SandboxedFunction(source, "f")(8) == [4, 2, 3, 64]
    assert SandboxedFunction(source, "square")(8) == 64


def test_keyword_arguments():
    assert SandboxedFunction("def f(a, *, b=1):\n    return [a, b]")(1, b=[2]) == [1, [2]]


@pytest.mark.parametrize(
    ("limit", "megabytes", "status"), [(128 << 20, 64, "ok"), (128 << 20, 256, "error"), (512 << 20, 256, "ok")]
)
def test_memory_limit(limit, megabytes, status):
    function = SandboxedFunction(
        "def f(n):\n    return len(bytearray(n << 20)) >> 20", config=SandboxConfig(memory_bytes=limit)
    )
    outcome = function.run(megabytes)
    assert outcome.status == status and (status == "ok" or type(outcome.error) is MemoryError)


def test_the_process_ends_with_the_object():
    function = SandboxedFunction("def f():\n    return 1")
    process = function._child.identity
    os.kill(process, 0)
    del function
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    "parsed",
    [
        {"x": [1]}, {"t": 1}, {"d": [1]}, {"i": "zz"}, {"b": "\u0100"}, {"s": [[1]]}, {}, {"t": [], "s": []},
        {"d": [{"i": "2000000000000000000"}, 0]}, {"s": [{"t": [{"i": "3fffffffffffffffe"}]}]}, {"i": 5}, {"d": "ab"},
    ],
    ids=repr,
)  # fmt: skip
def test_forged_answers_are_refused(parsed):
    with pytest.raises(codec.NotPlainError):
        codec.decode(parsed)


def colliding_tuples(count):
    """Pairs of integers that share a hash: CPython's hash of a tuple, solved for the second."""
    first, second, start, size = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64
    back_first, back_second = pow(first, -1, size), pow(second, -1, size)

    def turned(value, bits):
        return (value << bits | value >> (64 - bits)) % size

    found, a = [], 0
    while len(found) < count:
        a += 1
        before = turned((start + a * second) % size, 31) * first % size
        b = (turned(12345 * back_first % size, 33) - before) * back_second % size
        b -= size if b >= size // 2 else 0
        if -(2**60) < b < 2**60:
            found.append((a, b))
    return found


@pytest.mark.parametrize("tag", ["d", "s", "f"])
def test_keys_made_to_collide_do_not_keep_the_host_busy(tag):
    keys = colliding_tuples(2000)
    assert len({hash(key) for key in keys}) == 1
    flat = [part for key in keys for part in ([{"t": list(key)}, 0] if tag == "d" else [{"t": list(key)}])]
    with pytest.raises(codec.NotPlainError, match="of one hash"):
        codec.decode({tag: flat})
    honest = {(a, b): a for a in range(60) for b in range(60)}
    assert codec.decode(json.loads(codec.encode(honest, json.dumps))) == honest


def test_an_error_cannot_command_a_terminal():
    found = SandboxedFunction("def f():\n    raise ValueError('\\x1b]0;title\\x07 and \\x9b2J')").run()
    assert str(found.error) == "\ufffd]0;title\ufffd and \ufffd2J"
