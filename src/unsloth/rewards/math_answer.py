"""Rewards for answers that are numbers, or short texts with one right form."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from unsloth.core.errors import ConfigError
from unsloth.rewards.completions import Reward, from_column, from_text

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,60})?(?:\.\d{1,60})?(?:[eE][-+]?\d{1,3})?", re.ASCII)
_FRACTION = re.compile(r"([-+]?\d{1,60})\s?/\s?(\d{1,60})", re.ASCII)
_IN_TEXT = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,60})(?:\.\d{1,60})?(?:[eE][-+]?\d{1,3})?", re.ASCII
)
_DECORATION = " \t\r\n$€£%°*`'\"()[]{}="


def final_answer(text: str) -> str:
    r"""The answer in a completion: in the last ``<answer>`` tags, else in ``\boxed{}``, else after ``####``, else all.

    A text that closes its thinking with ``</think>`` counts from there on.
    """
    text = text.rpartition("</think>")[2]
    before, opened, rest = text.rpartition("<answer>")
    if opened:
        return rest.partition("</answer>")[0].strip()
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    return text.rpartition("####")[2].strip()


def parse_number(text: str) -> Fraction | None:
    """The number that a text is, exactly, or None if it is anything else.

    Accepts signs, thousands separated by commas, decimals, exponents up to three digits, fractions such as ``3/4``,
    and surrounding currency signs, percent signs, quotes, brackets and a final full stop.
    """
    text = text.strip(_DECORATION).removesuffix(".").strip(_DECORATION)
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        return Fraction(int(fraction[1]), int(fraction[2])) if int(fraction[2]) else None
    if not text or not _NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # such as "e5"
        return None


def last_number(text: str) -> Fraction | None:
    """The number that the text is, or else the last one in it."""
    whole = parse_number(text)
    if whole is not None:
        return whole
    found = _IN_TEXT.findall(text)
    return parse_number(found[-1]) if found else None


def same_answer(text: str, expected: Any) -> bool:
    """Whether both are the same number, or the same text apart from case and white space."""
    expected = str(expected)
    number = parse_number(text)
    if number is not None and number == parse_number(expected):
        return True
    return " ".join(text.split()).casefold() == " ".join(expected.split()).casefold()


def correctness(
    column: str = "answer",
    *,
    reward: float = 2.0,
    otherwise: float = 0.0,
    extract: Callable[[str], str] = final_answer,
) -> Reward:
    """``reward`` if the extracted answer is that of the data set's ``column``, as number or text."""
    return from_column(
        "correctness", column, lambda text, right: reward if same_answer(extract(text), right) else otherwise
    )


def integer(*, reward: float = 0.5, otherwise: float = 0.0, extract: Callable[[str], str] = final_answer) -> Reward:
    """``reward`` if the extracted answer is a whole number."""

    def score(text: str) -> float:
        number = parse_number(extract(text))
        return reward if number is not None and number.denominator == 1 else otherwise

    return from_text("integer", score)


def number_detected(*, reward: float = 1.0, otherwise: float = -1.0) -> Reward:
    """``reward`` if there is any number in the completion."""
    return from_text("number_detected", lambda text: reward if last_number(text) is not None else otherwise)


def proximity(
    column: str = "answer",
    *,
    exact: float = 3.0,
    near: float = 2.0,
    tolerance: float = 0.5,
    outlier: float = -1.5,
    missing: float = -2.0,
    extract: Callable[[str], str] = final_answer,
) -> Reward:
    """The closer the number, the more.

    With the relative error ``e = |x - right| / max(|right|, 1)``: ``exact`` if it is 0, else
    ``near · (1 - e / tolerance)`` up to ``e = tolerance``, and ``outlier`` beyond; ``missing`` if there is no number
    in the answer.

    Raises:
        ConfigError: ``tolerance`` is not positive. When called: a row's answer is not a number.
    """
    if tolerance <= 0:
        raise ConfigError("the tolerance of a proximity reward must be positive", got=tolerance, do="Pass e.g. 0.5.")

    def score(text: str, right: Any) -> float:
        wanted = parse_number(str(right))
        if wanted is None:
            raise ConfigError(
                f"column {column!r} holds something that is not a number", got=right, do="Use correctness() for texts."
            )
        number = last_number(extract(text))
        if number is None:
            return missing
        if number == wanted:
            return exact
        error = float(min(abs(number - wanted) / max(abs(wanted), Fraction(1)), Fraction(10**6)))
        return near * (1 - error / tolerance) if error <= tolerance else outlier

    return from_column("proximity", column, score)


def _boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}``, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 7 : position]
    return None
