import json

import pytest

from unsloth import create_locked_down_function, execute_with_time_limit
from unsloth.core.errors import ConfigError
from unsloth.environments import Game2048, GameBoard, GuessTheNumber, calculate
from unsloth.environments.board_2048 import _pushed


def count(row):
    gained = []
    return _pushed(row, gained), sum(gained)


@pytest.mark.parametrize(
    ("row", "after", "score"),
    [
        ([2, 0, 2, 0], [4, 0, 0, 0], 4),
        ([2, 2, 2, 2], [4, 4, 0, 0], 8),
        ([4, 2, 2, 0], [4, 4, 0, 0], 4),  # a sum does not join again
        ([2, 2, 2, 0], [4, 2, 0, 0], 4),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),
        ([2, 4, 8, 16], [2, 4, 8, 16], 0),
    ],
)
def test_a_row_of_2048(row, after, score):
    assert count(row) == (after, score)


def test_directions_and_ends_of_2048():
    game = GameBoard(size=3, seed=1, target=16)
    game._rows = [[2, 0, 0], [0, 0, 0], [2, 0, 4]]
    assert game._moved("W") == [[4, 0, 4], [0, 0, 0], [0, 0, 0]]
    assert game._moved("S") == [[0, 0, 0], [0, 0, 0], [4, 0, 4]]
    assert game._moved("D") == [[0, 0, 2], [0, 0, 0], [0, 2, 4]]
    assert game._moved("A") == [[2, 0, 0], [0, 0, 0], [2, 4, 0]]
    assert game.do_action("W") == "ongoing" and game.score == 4 and sum(map(bool, sum(game.board(), []))) == 3
    game._rows = [[2, 4, 2], [4, 2, 4], [2, 4, 2]]
    assert game.state() == "failed"
    game._rows = [[16, 4, 2], [4, 2, 4], [2, 4, 2]]
    assert game.state() == "success"
    with pytest.raises(ValueError, match="over"):
        game.do_action("W")
    with pytest.raises(ValueError, match="'X'"):
        game.do_action("X")


def test_the_same_seed_is_the_same_game():
    games = [GameBoard(size=4, seed=7), GameBoard(size=4, seed=7)]
    for action in "WASDWASDAAWW":
        for game in games:
            if game.state() == "ongoing":
                game.do_action(action)
    assert games[0].board() == games[1].board() and "\n" in games[0].board().pretty()
    assert games[0].moves <= 12


@pytest.mark.parametrize("wrong", [{"size": 1}, {"target": 100}, {"target": 4}, {"probability_fours": 2}])
def test_boards_that_are_none(wrong):
    with pytest.raises(ConfigError):
        GameBoard(**wrong)


def test_a_strategy_in_the_sandbox_plays_on_the_documented_board():
    strategy = create_locked_down_function("def strategy(board):\n    return 'W' if board[0][0] else 'A'")

    @execute_with_time_limit(5)
    def execute_strategy(strategy, game):
        steps = 0
        while game.state() == "ongoing" and steps < 5:
            game.do_action(strategy([row[:] for row in game.board()]))
            steps += 1
        return steps, game.state()

    assert execute_strategy(strategy, GameBoard(size=8, seed=42, target=2048, probability_fours=0.10)) == (5, "ongoing")


def test_2048_by_tool_calls():
    game = Game2048()
    assert game.reset(seed=3, target=8, moves=30).startswith("\nReach 8")
    assert game.get_reward() == 0
    with pytest.raises(ValueError, match="direction"):
        game.move("north")
    for move in range(30):
        if not game.over:
            game.move(("left", "up", "right", "down")[move % 4])
    assert game.over and game.get_reward() == 1.0
    game.reset(seed=3, target=2048, moves=1)
    assert not game.over
    game.move("left")
    assert game.over


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1 + 2 * 3", "7"),
        ("-(2 - 5) / 2", "1.5"),
        ("7 // 2 % 2", "1"),
        ("2 ** 10", "1024"),
        ("1e3", "1000"),
        (" 4 ", "4"),
    ],
)
def test_the_calculator(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "wrong",
    ["", "1 +", "1 / 0", "9 ** 9 ** 9", "10 ** 300", "(-8) ** 0.5", "abs(1)", "x", "'a' * 3", "1" * 201, None, "True"],
)
def test_the_calculator_refuses(wrong):
    with pytest.raises(ValueError):  # noqa: PT011 - all of its messages
        calculate(wrong)


def test_guessing():
    game = GuessTheNumber()
    assert "1 to 20" in game.reset(seed=4)
    sought = game._sought
    low, high = 1, 20
    for _ in range(6):
        guess = (low + high) // 2
        answer = game.next_turn(f"Perhaps {guess}")
        if answer is None:
            break
        low, high = (guess + 1, high) if "larger" in answer else (low, guess - 1)
    assert game.found and guess == sought and 0.5 < game.get_reward() <= 1
    game.reset(seed=4)
    assert game.get_reward() == 0.0
    assert game.next_turn("3 or 4") == "Answer with one number only."
    for _ in range(5):
        last = game.next_turn("none")
    assert last is None and 0 <= game.get_reward() < 0.4


def test_the_names_are_there():
    import unsloth.environments as found

    assert json.dumps(sorted(dir(found))) and all(getattr(found, name) for name in found.__all__)
