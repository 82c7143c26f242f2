"""Which of llama.cpp's ways of cutting a text into words a tokenizer has.

Byte-level BPE merges within words, so the two programs must cut alike. llama.cpp knows ways by name; a tokenizer says
its way in ``tokenizer.json``, as a list of steps. The table pairs the steps, in a canonical spelling, with the name.
"""

from __future__ import annotations

import re
from typing import Any

from unsloth.core.errors import TokenizerError

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = "gpt2"  # the pattern that ByteLevel has built in

# Names by steps, and by whether a whole word that is a token is taken without merging ("ignore_merges").
_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    ("digits", _GPT2): {False: "smollm"},
    (_ENDINGS + _LETTERS + r"|\p{N}{1,3}" + _REST,): {True: "llama-bpe", False: "dbrx"},
    (_ENDINGS + _LETTERS + r"|\p{N}" + _REST,): {False: "qwen2"},
    (_CASED[0] + "|" + _CASED[1] + r"|\p{N}" + _CASED_REST,): {True: "tekken"},
    (_CASED[0] + _ENDINGS + "?|" + _CASED[1] + _ENDINGS + r"?|\p{N}{1,3}" + _CASED_REST,): {False: "gpt-4o"},
}

WITHOUT_MARKS = ("tekken", "gpt-4o")
"""llama.cpp's pattern for these leaves combining marks out of words; the tokenizers' own does not."""


def name(tokenizer_json: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which this byte-level tokenizer cuts a text into words.

    Args:
        tokenizer_json: The content of ``tokenizer.json``.

    Raises:
        TokenizerError: A way that is not in the table.
    """
    found = tuple(step for part in _parts(tokenizer_json.get("pre_tokenizer")) for step in _steps(part))
    whole_words = bool(tokenizer_json["model"].get("ignore_merges"))
    names = _NAMES.get(found)
    if names is None or whole_words not in names:
        raise TokenizerError(
            "the way in which this tokenizer cuts words is not known to have a name in llama.cpp",
            got=" then ".join(found) or "none",
            do='If you know the name, say it: pre_tokenizer="...", for instance "qwen2". The tokens are compared.',
        )
    return names[whole_words]


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _steps(part: dict[str, Any]) -> list[str]:
    kind = part["type"]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            return ["a space before the text", _GPT2]
        return [_GPT2] if part.get("use_regex", True) else []
    if kind == "Digits":
        return ["digits" if part.get("individual_digits") else "runs of digits"]
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"]
        return [_canonical(pattern["Regex"]) if "Regex" in pattern else repr(pattern["String"])]
    return [kind]


def _canonical(pattern: str) -> str:
    """A spelling that is the same for patterns that differ in nothing but how English endings are written."""
    spelled = re.sub(
        r"\(\?:'\[sS\]\|'\[tT\]\|'\[rR\]\[eE\]\|'\[vV\]\[eE\]\|'\[mM\]\|'\[lL\]\[lL\]\|'\[dD\]\)", "", pattern
    )
    if spelled != pattern:
        pattern = _ENDINGS + spelled
    return pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _ENDINGS).replace(r"\p{N}{1}|", r"\p{N}|")
