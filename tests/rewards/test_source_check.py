import pytest

from unsloth import check_python_modules, create_locked_down_function
from unsloth.core.errors import (
    ConfigError,
    GeneratedCodeError,
    RefusedImportError,
    RefusedNameError,
)


@pytest.mark.parametrize(
    "body",
    ["import math", "from typing import Callable", "import os.path as p", "from collections import *", "x = 1"],
)
def test_pythons_own_modules_are_fine(body):
    ok, info = check_python_modules(f"def strategy(board):\n    {body}\n    return 'W'")
    assert ok and "error" not in info


@pytest.mark.parametrize(
    ("body", "key", "name"),
    [
        ("from numpy import matmul", "non_stdlib", "numpy"),
        ("import torch.nn as nn", "non_stdlib", "torch.nn"),
        ("import math, numpy", "non_stdlib", "numpy"),
        ("from . import x", "relative_imports", "."),
        ("from ..a.b import x", "relative_imports", "..a.b"),
        ("n = __import__('numpy')", "dynamic", "__import__"),
        ("import importlib\n    importlib.import_module('numpy')", "dynamic", "importlib"),
        ("exec('import numpy')", "dynamic", "exec"),
        ("e = eval", "dynamic", "eval"),
        ("b = __builtins__['__import__']", "dynamic", "__builtins__"),
    ],
)
def test_other_modules_are_not(body, key, name):
    ok, info = check_python_modules(f"def strategy(board):\n    {body}\n    return 'W'")
    assert not ok and name in info[key] and "error" not in info


@pytest.mark.parametrize(
    "source", ["def f(:", "def f():\nreturn", "x = '\0'", "(" * 300, "-" * 50000 + "1", "1" * 5000]
)
def test_what_is_no_python_is_an_error(source):
    ok, info = check_python_modules(source)
    assert not ok and list(info) == ["error"]


def test_a_source_that_is_too_long_is_not_looked_at():
    ok, info = check_python_modules("x = 1\n" * 100_000)
    assert not ok and "600,000 characters" in info["error"]


def test_a_source_must_be_text():
    with pytest.raises(ConfigError, match="must be a string"):
        check_python_modules(None)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("import numpy\ndef f(x):\n    return numpy.zeros(x)", RefusedImportError, "line 1 imports at the top"),
        ("import math\ndef f(x):\n    return math.sqrt(x)", RefusedImportError, "inside its function"),
        ("def f(x):\n    import numpy\n    return x", RefusedImportError, "'numpy' is not available"),
        ("def f(x):\n    from os import system\n    return x", RefusedImportError, "'os' is not available"),
        ("def f(x):\n    from . import y\n    return x", RefusedImportError, "'.' is not available"),
        ("table = {}\ndef f(x):\n    return table", RefusedNameError, "line 1 is at the top level"),
        ("def f(x):\n    global table\n    table = x", RefusedNameError, "'table'"),
        ("def f(x):\n    return np.zeros(x)", RefusedNameError, "'np'"),
        ("def f(x):\n    return [lambda: y for _ in x]", RefusedNameError, "'y'"),
        ("class A:\n    pass", RefusedNameError, "top level"),
        ("print('hello')", RefusedNameError, "top level"),
        ("'only a text'", GeneratedCodeError, "no function"),
        ("", GeneratedCodeError, "no function"),
        ("def f(x):\n    nonlocal y\n    return y", SyntaxError, "nonlocal"),
        ("def f(x)\n    return x", SyntaxError, "expected ':'"),
    ],
)
def test_globals_and_imports_are_refused(source, error, match):
    with pytest.raises(error, match=match):
        create_locked_down_function(source)


def test_refusals_are_what_python_calls_them():
    assert issubclass(RefusedImportError, ImportError) and issubclass(RefusedNameError, NameError)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(x):\n    return x", "f"),
        ("'''Text.'''\ndef f(x):\n    return g(x)\ndef g(x):\n    return x", "f"),
        ("def g(x):\n    return x\ndef f(x):\n    return g(x)", "f"),
        ("def f(n):\n    return n and f(n - 1)", "f"),
        ("def f(x):\n    return x\ndef g(x):\n    return x", "f"),
        ("def f(x):\n    return g(x)\ndef g(x):\n    return x and f(0)", "f"),
    ],
)
def test_the_function_that_is_meant(source, name):
    assert create_locked_down_function(source).__name__ == name


def test_names_from_around_and_builtins_are_no_globals():
    source = (
        "def f(xs: list, *rest, key=None, **more):\n    total = 0\n    def add(y):\n        nonlocal total\n"
        "        total += y\n    class A:\n        n = 1\n        m = n + 1\n    for x in sorted(xs):\n        add(x)\n"
        "    return total + A.m + sum(y for y in rest) + len(more)"
    )
    assert create_locked_down_function(source)([1, 2], 3, a=1) == 9
