"""Text of a completion as it grows, token by token, and its end at a stop text.

A token is not a whole number of characters: what ends in an incomplete one (U+FFFD) waits for more tokens, and so does
what may be the beginning of a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one completion.

    Args:
        tokenizer: Of transformers.
        stops: Texts that end the completion.
        skip_special_tokens: Whether special tokens are left out.
        keep_stop: Whether the text keeps the stop text.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), skip_special_tokens: bool = True, keep_stop: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._skip, self._keep_stop = skip_special_tokens, keep_stop
        self._ids: list[int] = []
        self._start = 0  # tokens from here to _read are decoded with new ones: a tokenizer joins neighbours
        self._read = 0  # tokens up to here have their text in _text
        self._text = ""
        self._shown = 0

    @property
    def text(self) -> str:
        """What may be shown for certain."""
        return self._text[: self._shown]

    def add(self, token: int, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop text that it completes, or None (always, unless it ``may_stop``)."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(_INCOMPLETE) or len(now) < len(before):
            return None
        return self._grow(now[len(before) :], self._stops if may_stop else ())

    def finish(self) -> None:
        """No more tokens: show what was held back."""
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) > len(before):
            self._text += now[len(before) :]
        self._shown = len(self._text)

    def _grow(self, piece: str, stops: Sequence[str]) -> str | None:
        searched = max(0, len(self._text) - max((len(stop) for stop in stops), default=1) + 1)
        self._text += piece
        self._start, self._read = self._read, len(self._ids)
        found = [(at, stop) for stop in stops if (at := self._text.find(stop, searched)) >= 0]
        if found:
            at, stop = min(found)
            self._text = self._text[: at + len(stop) if self._keep_stop else at]
            self._shown = len(self._text)
            return stop
        self._shown = len(self._text) - self._held_back()
        return None

    def _held_back(self) -> int:
        """Characters at the end that may become a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
