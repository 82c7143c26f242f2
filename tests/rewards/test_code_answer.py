import json

import pytest

from unsloth.core.errors import ConfigError
from unsloth.rewards import SandboxConfig, call_reward, code_tests, equal, extract_code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("a\n```\nx = 1\n```\nb", "x = 1"),
        ("```py\nfirst\n```\n```python\nlast\n```", "last"),
        ("```python\nwhole\n```\n```python\ncut off", "whole"),
        ("```x = 1```", "x = 1"),
        ("no code", None),
        ("```python\ncut off", None),
        ("", None),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, 1, True), (1, 1.0, True), (0.1 + 0.2, 0.3, True), (1, True, False), (0, False, False), (None, None, True),
        (None, 0, False), ([1, 2], (1, 2), True), ([1], [1, 2], False),
        ({"a": [1.0]}, {"a": [1]}, True), ({"a": 1}, {"b": 1}, False),
        ("a", "a", True), ("1", 1, False), (float("nan"), float("nan"), True), (10**400, 1.0, False),
        ({1}, {1}, True), ([], {}, False),
    ],
)  # fmt: skip
def test_equal(value, expected, same):
    assert equal(value, expected) is same


def fenced(code):
    return f"```python\n{code}\n```"


TESTS = [[[1], 1], [[2], 4], [[3], 9], [[-1], 1]]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (fenced("def f(x):\n    return x * x"), 1.0),
        (fenced("import math\nK = 2\ndef f(x):\n    return math.pow(x, K)"), 1.0),
        (fenced("def f(x):\n    return x"), 0.25),
        (fenced("def f(x):\n    return x * x if x > 0 else 1 / 0"), 0.75),
        (fenced("def f(x):\n    while x == 2: pass\n    return x * x"), 0.25),
        (fenced("def f(x)\n    return x"), -0.5),
        (fenced("x = 1"), -0.5),
        (fenced("1 / 0\ndef f(x):\n    return x"), -0.5),
        ("no code at all", -1.0),
    ],
)
def test_the_share_of_tests_passed(text, reward):
    function = code_tests(config=SandboxConfig(seconds=0.4))
    assert call_reward(function, ["p"], [text], {"tests": [TESTS]}).values == [reward]


def test_tests_as_json_and_a_named_function():
    text = fenced("def helper(x):\n    return 0\ndef square(x):\n    return x * x")
    reward = code_tests("cases", name="square", reward=2.0)
    assert call_reward(reward, ["p"], [text], {"cases": [json.dumps(TESTS)]}).values == [2.0]


@pytest.mark.parametrize("tests", [[], None, "not json", [[1, 2]], [[[1]]], 5])
def test_rows_without_usable_tests(tests):
    with pytest.raises(ConfigError, match="must hold tests"):
        code_tests()(prompts=["p"], completions=[fenced("def f(x):\n    return x")], tests=[tests])
