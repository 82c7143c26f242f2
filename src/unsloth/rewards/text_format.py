"""Rewards for the form of a completion: tags, required words, length, a signature. All scan the text linearly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from unsloth.core.errors import ConfigError
from unsloth.rewards.completions import Reward, from_column, from_text

TAGS = ("reasoning", "answer")

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_PHONE = re.compile(r"(?<!\w)\+?\d(?:[ ()./-]{0,2}\d){6,14}(?!\w)")
_STREET = re.compile(
    r"\b\d{1,5}[a-z]?,? (?:[A-Z][\w'-]{1,30} ){1,4}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Way|Square)\b"
    r"|\b[A-Z][\w-]{2,40}(?:straße|strasse|weg|platz|gasse) \d{1,5}\b"
)


def soft_format(tags: Sequence[str] = TAGS, *, reward: float = 0.5, otherwise: float = 0.0) -> Reward:
    """``reward`` if the completion is the tags in order, each with a content, with any white space around them."""
    _check_tags(tags)
    return from_text("soft_format", lambda text: reward if _in_order(text.strip(), tags, strict=False) else otherwise)


def strict_format(tags: Sequence[str] = TAGS, *, reward: float = 0.5, otherwise: float = 0.0) -> Reward:
    r"""``reward`` if each tag and each content is on lines of its own and nothing else is there.

    For example ``"<reasoning>\nIt is even.\n</reasoning>\n<answer>\n4\n</answer>\n"``; the last newline may be
    absent.
    """
    _check_tags(tags)
    return from_text("strict_format", lambda text: reward if _in_order(text, tags, strict=True) else otherwise)


def xml_count(tags: Sequence[str] = TAGS, *, reward: float = 0.5, trailing: float = 0.001) -> Reward:
    """A share of ``reward`` for each opening and closing tag that is there exactly once.

    ``trailing`` is taken off for each character after the last closing tag, white space around them excepted, down to
    ``-reward``.
    """
    _check_tags(tags)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def score(text: str) -> float:
        found = sum(text.count(mark) == 1 for mark in marks)
        closed, _, rest = text.rpartition(marks[-1])
        after = len(rest.strip()) if closed else 0
        return max(reward * found / len(marks) - trailing * after, -reward)

    return from_text("xml_count", score)


def keyword(
    words: str | Sequence[str],
    *,
    reward: float = 1.0,
    otherwise: float = 0.0,
    match: Literal["any", "all"] = "any",
    case_sensitive: bool = False,
) -> Reward:
    """``reward`` if any (or all) of the words or phrases occur, as whole words."""
    listed = [words] if isinstance(words, str) else list(words)
    if not listed or not all(listed):
        raise ConfigError("a keyword reward needs words", got=words, do="Pass a word or a list of them.")
    flags = re.NOFLAG if case_sensitive else re.IGNORECASE
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags) for word in listed]
    decide = any if match == "any" else all
    return from_text(
        "keyword", lambda text: reward if decide(p.search(text) is not None for p in patterns) else otherwise
    )


def contains(column: str, *, reward: float = 1.0, otherwise: float = 0.0) -> Reward:
    """``reward`` if the row's text of ``column`` (a recipient's name) occurs in the completion, in any case."""
    return from_column(
        "contains",
        column,
        lambda text, part: reward if str(part).strip() and str(part).casefold() in text.casefold() else otherwise,
    )


def exact_match(column: str = "answer", *, reward: float = 1.0, otherwise: float = 0.0) -> Reward:
    """``reward`` if the completion is the row's text of ``column``, white space at both ends apart."""
    return from_column(
        "exact_match", column, lambda text, right: reward if text.strip() == str(right).strip() else otherwise
    )


def length(
    *,
    minimum: int = 0,
    maximum: int,
    unit: Literal["characters", "words"] = "characters",
    reward: float = 0.0,
    otherwise: float = -1.0,
) -> Reward:
    """``reward`` if the completion has ``minimum`` to ``maximum`` characters or words."""
    if not 0 <= minimum <= maximum:
        raise ConfigError("minimum and maximum length", got=(minimum, maximum), do="Pass 0 <= minimum <= maximum.")
    if unit not in ("characters", "words"):
        raise ConfigError("unknown unit of length", got=unit, do='Use "characters" or "words".')

    def score(text: str) -> float:
        measured = len(text) if unit == "characters" else len(text.split())
        return reward if minimum <= measured <= maximum else otherwise

    return from_text("length", score)


def signature(*, reward: float = 1.0, otherwise: float = 0.0, lines: int = 8) -> Reward:
    """``reward`` if the last ``lines`` non-empty lines have an e-mail address, a telephone number or a street."""

    def score(text: str) -> float:
        end = [line[:300] for line in text.splitlines() if line.strip()][-lines:]
        found = any(pattern.search(line) for line in end for pattern in (_EMAIL, _PHONE, _STREET))
        return reward if found else otherwise

    return from_text("signature", score)


def _check_tags(tags: Any) -> None:
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ConfigError("tags must be a list of names", got=tags, do='Pass e.g. ["reasoning", "answer"].')


def _in_order(text: str, tags: Sequence[str], *, strict: bool) -> bool:
    """Whether the text is nothing but the tags in order, each once and not empty; with line breaks if strict."""
    line = "\n" if strict else ""
    position = 0
    for number, tag in enumerate(tags):
        between = "\n" if strict and number else ""
        if not strict:
            position = len(text) - len(text[position:].lstrip())
        opened = f"{between}<{tag}>{line}"
        end = text.find(f"{line}</{tag}>", position + len(opened))
        if not text.startswith(opened, position) or end < 0:
            return False
        content = text[position + len(opened) : end]
        if not content.strip() or any(mark in content for name in tags for mark in (f"<{name}>", f"</{name}>")):
            return False
        position = end + len(f"{line}</{tag}>")
    return text[position:] in ("", line)
