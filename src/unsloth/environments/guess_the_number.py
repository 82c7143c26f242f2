"""A small game in plain text, for models that call no tools."""

from __future__ import annotations

import random
import re
from typing import Any


class GuessTheNumber:
    """The model names numbers, and is told whether the one sought is larger or smaller.

    Rows of the data set may have ``seed``, ``largest`` and ``guesses``. The reward is 1 for a number found at once, and
    less the more guesses it took, but 0.5 at least; otherwise up to 0.4 for the share of all numbers that the guesses
    have ruled out.
    """

    def __init__(self) -> None:
        self._sought, self._guesses, self._left = 1, 1, 1
        self._low, self._high, self._largest = 1, 1, 1
        self.found = False

    def reset(self, seed: int = 0, largest: int = 20, guesses: int = 6, **row: Any) -> str:
        """Think of a number; returns the rules."""
        self._sought = random.Random(seed).randint(1, largest)
        self._guesses = self._left = guesses
        self._low, self._high, self._largest = 1, largest, largest
        self.found = False
        return f"\nI think of a number from 1 to {largest}. Guess it: answer with a number only."

    def next_turn(self, answer: str) -> str | None:
        """Judge a guess; None ends the game."""
        numbers = re.findall(r"-?\d{1,9}", answer)
        self._left -= 1
        if len(numbers) == 1:
            guess = int(numbers[0])
            self.found = guess == self._sought
            if guess < self._sought:
                self._low = max(self._low, guess + 1)
            else:
                self._high = min(self._high, guess if self.found else guess - 1)
        if self.found or not self._left:
            return None
        if len(numbers) != 1:
            return "Answer with one number only."
        return "It is larger." if guess < self._sought else "It is smaller."

    def get_reward(self) -> float:
        """How well the game went, from 0 to 1."""
        if self.found:
            return 0.5 + 0.5 * (self._left + 1) / self._guesses
        return 0.4 * (1 - (self._high - self._low + 1) / self._largest)
