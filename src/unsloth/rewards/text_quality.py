"""Rewards against text that nobody would write: gibberish, and the wrong language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from unsloth.core.errors import ConfigError
from unsloth.rewards.completions import Reward, from_text

_WORD = re.compile(r"[^\W\d_]+")
_CHARACTERS_READ = 20_000

# Frequent function words that are frequent in few other languages of the list.
_FUNCTION_WORDS = {
    "en": "the and of to is that it was for with are this be have not you from they which there would what their",
    "de": "der die und das ist nicht ein eine den dem zu mit auf für sich auch wird sind werden ich wie oder bei nach",
    "fr": "le la les et est une des dans que qui pour pas sur avec ce il elle sont nous vous être cette mais du au",
    "es": "el los las y es una del que por con para no se como más pero su está son este también hay muy",
    "it": "il lo gli e è una della che di per non si con come sono anche questo più ma nel alla dei ha",
    "pt": "o os as e é uma do da que não em para com se por mais como são dos está também mas ao foi",
    "nl": "de het een en van is dat niet op te zijn voor met aan ook door maar er wordt naar bij uit deze",
    "sv": "och att det som en är på för av med den till inte om har de ett från vi kan men var så",
    "pl": "i w na nie się z do jest to że o jak za ale po od przez są tym być dla oraz który",
    "id": "yang dan di untuk dengan ini itu dari dalam tidak adalah pada akan ke juga saya kita bisa karena atau oleh",
}
# Scripts that stand for one language well enough; the value is the start of the characters' Unicode names.
_SCRIPTS = {
    "ja": ("HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "zh": ("CJK",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "el": ("GREEK",),
    "ru": ("CYRILLIC",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}
_LISTS = {code: frozenset(words.split()) for code, words in _FUNCTION_WORDS.items()}
LANGUAGES = (*_FUNCTION_WORDS, *_SCRIPTS)


def detect_language(text: str) -> str | None:
    """A guess at the language of a text, as a two-letter code, or None if there is too little to go by.

    By script for ``ja ko zh ar he el ru hi th`` (so Ukrainian reads as ``ru``, Persian as ``ar``, Marathi as ``hi``),
    and by the share of common function words for ``en de fr es it pt nl sv pl id``. Any other language in Latin
    letters, a few words, code and formulas give None or, at times, a neighbour.
    """
    text = text[:_CHARACTERS_READ]
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return None
    scripts = Counter(unicodedata.name(letter, "").split(" ")[0].split("-")[0] for letter in letters)
    if scripts["LATIN"] < 0.5 * len(letters):
        return _by_script(scripts, len(letters))
    return _by_words([word.lower() for word in _WORD.findall(text)])


def language(code: str, *, reward: float = 1.0, otherwise: float = -1.0, unknown: float = 0.0) -> Reward:
    """``reward`` if :func:`detect_language` says ``code``, ``otherwise`` for another, ``unknown`` if it cannot tell.

    Raises:
        ConfigError: The language is not one that it can tell.
    """
    if code not in LANGUAGES:
        raise ConfigError("a language that cannot be detected", got=code, do=f"Use one of {', '.join(LANGUAGES)}.")

    def score(text: str) -> float:
        found = detect_language(text)
        return unknown if found is None else reward if found == code else otherwise

    return from_text("language", score)


def gibberish(
    *, penalty: float = -2.0, words: Sequence[str] = ("addCriterion",), share: float = 0.5, repeats: int = 8
) -> Reward:
    """``penalty`` for degenerate text, else 0.

    Degenerate is a text of which at least ``share`` is line breaks and ``words``; or in which the same word, or the
    same three words, follow each other ``repeats`` times; or at least ``share`` of whose characters, if there are 40
    or more, are control characters or unassigned.
    """
    if not 0 < share <= 1 or repeats < 2:
        raise ConfigError("gibberish settings", got=(share, repeats), do="Use 0 < share <= 1 and repeats >= 2.")

    def score(text: str) -> float:
        if not text:
            return 0.0
        rest = text
        for word in words:
            rest = rest.replace(word, "")
        filler = len(text) - len(rest.replace("\n", ""))
        tokens = text.split()
        looping = any(_longest_loop(tokens, size) >= repeats for size in (1, 3))
        odd = sum(unicodedata.category(character)[0] == "C" and not character.isspace() for character in text)
        if filler >= share * len(text) or looping or (len(text) >= 40 and odd >= share * len(text)):
            return penalty
        return 0.0

    return from_text("gibberish", score)


def _by_script(scripts: Counter[str], letters: int) -> str | None:
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * letters:
        return "ja"  # most of its letters may be Chinese characters
    for code, names in _SCRIPTS.items():
        if sum(scripts[name] for name in names) > 0.5 * letters:
            return code
    return None


def _by_words(words: list[str]) -> str | None:
    """The language whose function words are most of all, if they are many and clearly more than of any other."""
    if len(words) < 5:
        return None
    counts = Counter(words)
    shares = sorted(
        ((sum(counts[word] for word in listed) / len(words), code) for code, listed in _LISTS.items()), reverse=True
    )
    (best, code), (second, _) = shares[:2]
    varied = len(_LISTS[code] & counts.keys()) >= 2
    return code if varied and best >= 0.12 and best >= 1.3 * second else None


def _longest_loop(tokens: list[str], size: int) -> int:
    """How many times at most the same ``size`` tokens follow each other."""
    longest = run = 0
    for position in range(size, len(tokens)):
        run = run + 1 if tokens[position] == tokens[position - size] else 0
        longest = max(longest, run)
    return longest // size + 1 if tokens else 0
