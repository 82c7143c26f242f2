"""The game 2048: a board that programs play on, and the same game move by move as a tool."""

from __future__ import annotations

import random
from typing import Any, Literal

from unsloth.core.errors import ConfigError

State = Literal["ongoing", "success", "failed"]

_TURNS = {"A": 0, "W": 1, "D": 2, "S": 3}  # quarter turns against the clock until the move goes to the left
_NAMES = {"left": "A", "up": "W", "right": "D", "down": "S"}


class Board(list[list[int]]):
    """Rows of numbers, 0 where there is none."""

    def pretty(self) -> str:
        """The board as text, a line for each row."""
        width = max(len(str(number)) for row in self for number in row)
        return "\n".join(" ".join((str(number) if number else ".").rjust(width) for number in row) for row in self)


class GameBoard:
    """A game of 2048: equal numbers that meet are added up, and after every move a new number appears.

    Args:
        size: Rows and columns, 2 or more.
        seed: Of the new numbers. The same moves from the same seed give the same game.
        target: The number that wins, a power of 2 above 4.
        probability_fours: Share of new numbers that are 4 instead of 2.

    Raises:
        ConfigError: Values that make no game.
    """

    def __init__(
        self, size: int = 4, seed: int | None = None, target: int = 2048, probability_fours: float = 0.10
    ) -> None:
        if size < 2:
            raise ConfigError("a board needs two rows or more", got=f"size={size}")
        if target < 8 or target & (target - 1):
            raise ConfigError("the number that wins must be a power of 2 above 4", got=f"target={target}")
        if not 0 <= probability_fours <= 1:
            raise ConfigError("probability_fours is a share", got=probability_fours, do="Pass 0 to 1.")
        self.size, self.target, self.probability_fours = size, target, probability_fours
        self.score = 0
        """Sum of all numbers that additions made."""
        self.moves = 0
        """Moves that changed the board."""
        self._random = random.Random(seed)
        self._rows = [[0] * size for _ in range(size)]
        self._add_number()
        self._add_number()

    def board(self) -> Board:
        """A copy of the board: what a strategy gets to see."""
        return Board(row[:] for row in self._rows)

    @property
    def largest(self) -> int:
        """The largest number on the board."""
        return max(map(max, self._rows))

    def state(self) -> State:
        """Whether the game goes on, is won, or has no move left."""
        if self.largest >= self.target:
            return "success"
        return "ongoing" if any(self._moved(action) != self._rows for action in _TURNS) else "failed"

    def do_action(self, action: str) -> State:
        """Move all numbers: "W" up, "A" left, "S" down, "D" right. A move that changes nothing adds no number.

        Raises:
            ValueError: There is no such action, or the game is over.
        """
        if action not in _TURNS:
            raise ValueError(f'the actions are "W", "A", "S" and "D", not {action!r:.80}')
        if self.state() != "ongoing":
            raise ValueError("the game is over")
        gained: list[int] = []
        rows = self._moved(action, gained)
        if rows != self._rows:
            self._rows = rows
            self.moves += 1
            self.score += sum(gained)
            self._add_number()
        return self.state()

    def _add_number(self) -> None:
        free = [(y, x) for y, row in enumerate(self._rows) for x, number in enumerate(row) if not number]
        y, x = self._random.choice(free)
        self._rows[y][x] = 4 if self._random.random() < self.probability_fours else 2

    def _moved(self, action: str, gained: list[int] | None = None) -> list[list[int]]:
        rows = self._rows
        for _ in range(_TURNS[action]):
            rows = _turned(rows)
        rows = [_pushed(row, gained) for row in rows]
        for _ in range(-_TURNS[action] % 4):
            rows = _turned(rows)
        return rows


class Game2048:
    """2048 as an environment: the model calls ``move`` until the game is won, lost, or it has had its moves.

    Rows of the data set may have ``seed``, ``size``, ``target`` and ``moves`` (how many it may make). Completions of
    one prompt share a row, so they play from the same board. The reward is the share of the way to the target in
    doublings, 1 for a won game; a game without a legal move counts 0.
    """

    def __init__(self) -> None:
        self.over = False
        self.game = GameBoard(seed=0)
        self._left = 0

    def reset(self, seed: int = 0, size: int = 4, target: int = 64, moves: int = 40, **row: Any) -> str:
        """Begin a game; returns what the model sees of it."""
        self.game, self.over, self._left = GameBoard(size, seed, target), False, moves
        return f"\nReach {target}. The board:\n{self.game.board().pretty()}"

    def move(self, direction: str) -> str:
        """Push all numbers of the board to one side; equal numbers that meet are added up.

        Args:
            direction: One of "left", "right", "up" and "down".

        Returns:
            The board afterwards.
        """
        if direction not in _NAMES:
            raise ValueError(f'direction must be "left", "right", "up" or "down", not {direction!r:.80}')
        before = self.game.moves
        state = self.game.do_action(_NAMES[direction])
        self._left -= 1
        self.over = state != "ongoing" or self._left <= 0
        if state != "ongoing":
            return "You won." if state == "success" else "No move is left, the game is over."
        said = "" if self.game.moves > before else "Nothing moved.\n"
        return f"{said}{self.game.board().pretty()}"

    def get_reward(self) -> float:
        """How far the game came, from 0 to 1."""
        if not self.game.moves:
            return 0.0
        reached, target = self.game.largest.bit_length() - 2, self.game.target.bit_length() - 2
        return min(reached / target, 1.0)


def _turned(rows: list[list[int]]) -> list[list[int]]:
    """A quarter turn against the clock."""
    return [list(column) for column in zip(*rows, strict=True)][::-1]


def _pushed(row: list[int], gained: list[int] | None) -> list[int]:
    """A row after a move to the left; a sum does not take part in another one."""
    found: list[int] = []
    joins = False
    for number in row:
        if not number:
            continue
        if joins and found[-1] == number:
            found[-1] *= 2
            joins = False
            if gained is not None:
                gained.append(found[-1])
        else:
            found.append(number)
            joins = True
    return found + [0] * (len(row) - len(found))
