"""The two tasks of the reinforcement learning guides, as scripts write them: playing 2048, multiplying matrices."""

import random

import pytest

from unsloth import check_python_modules, create_locked_down_function, execute_with_time_limit
from unsloth.rewards import Rewards, find_memory, time_calls


class GameBoard:
    """2048 with W, A, S, D."""

    def __init__(self, size, seed, target, probability_fours):
        self.size, self.target, self.fours = size, target, probability_fours
        self.random = random.Random(seed)
        self.rows = [[0] * size for _ in range(size)]
        self.add()

    def board(self):
        return [list(row) for row in self.rows]

    def state(self):
        if any(self.target in row for row in self.rows):
            return "success"
        return "ongoing" if any(self.moved(key) != self.rows for key in "WASD") else "failed"

    def add(self):
        empty = [(i, j) for i in range(self.size) for j in range(self.size) if not self.rows[i][j]]
        i, j = self.random.choice(empty)
        self.rows[i][j] = 4 if self.random.random() < self.fours else 2

    def moved(self, key):
        rows = [list(column) for column in zip(*self.rows, strict=True)] if key in "WS" else self.board()
        rows = [self.merged(row[::-1])[::-1] if key in "SD" else self.merged(row) for row in rows]
        return [list(column) for column in zip(*rows, strict=True)] if key in "WS" else rows

    def merged(self, row):
        tiles, result = [tile for tile in row if tile], []
        while tiles:
            tile = tiles.pop(0)
            if tiles and tiles[0] == tile:
                tile += tiles.pop(0)
            result.append(tile)
        return result + [0] * (self.size - len(result))

    def do_action(self, key):
        after = self.moved(key)
        if after != self.rows:
            self.rows = after
            self.add()


@execute_with_time_limit(2)
def execute_strategy(strategy, game):
    steps = 0
    while game.state() == "ongoing" and steps < 150:
        action = strategy(game.board())
        steps += 1
        if action not in ("W", "A", "S", "D"):
            return steps, "failed"
        game.do_action(action)
    return steps, game.state()


def extract_function(text):
    if text.count("```") >= 2:
        first = text.find("```") + 3
        fx = text[first : text.find("```", first)].strip().removeprefix("python\n")
        fx = fx[fx.find("def") :]
        if fx.startswith("def strategy(board):"):
            return fx
    return None


def function_works(completions, **kwargs):
    scores = []
    for completion in completions:
        function = extract_function(completion[0]["content"])
        if function is None:
            scores.append(-2.0)
            continue
        ok, info = check_python_modules(function)
        if "error" in info:
            scores.append(-2.0)
            continue
        try:
            _ = create_locked_down_function(function)
            scores.append(1.0)
        except Exception:  # noqa: BLE001 - as the guide writes it
            scores.append(-0.5)
    return scores


def no_cheating(completions, **kwargs):
    scores = []
    for completion in completions:
        function = extract_function(completion[0]["content"])
        scores.append(-1.0 if function is None else 1.0 if check_python_modules(function)[0] else -20.0)
    return scores


def strategy_succeeds(completions, **kwargs):
    scores = []
    for completion in completions:
        function = extract_function(completion[0]["content"])
        if function is None:
            scores.append(-2.0)
            continue
        try:
            new_strategy = create_locked_down_function(function)
        except Exception:  # noqa: BLE001
            scores.append(0.0)
            continue
        try:
            game = GameBoard(size=4, seed=7, target=64, probability_fours=0.10)
            _, state = execute_strategy(new_strategy, game)
            scores.append(20.0 if state == "success" else 2.0)
        except TimeoutError:
            scores.append(-1.0)
        except Exception:  # noqa: BLE001
            scores.append(-3.0)
    return scores


CORNER = """
def strategy(board):
    def after(key):
        rows = [list(c) for c in zip(*board)] if key in "WS" else [list(r) for r in board]
        result = []
        for row in rows:
            row = row[::-1] if key in "SD" else row
            tiles, out = [t for t in row if t], []
            while tiles:
                t = tiles.pop(0)
                if tiles and tiles[0] == t:
                    t += tiles.pop(0)
                out.append(t)
            out += [0] * (len(row) - len(out))
            result.append(out[::-1] if key in "SD" else out)
        return [list(c) for c in zip(*result)] if key in "WS" else result
    same = [list(r) for r in board]
    options = [(sum(row.count(0) for row in after(k)), k) for k in "WASD" if after(k) != same]
    return max(options)[1] if options else "W"
"""
REPLIES = {
    "plays well": (CORNER, [1.0, 1.0, 20.0]),
    "always the same": ('def strategy(board):\n    return "W"', [1.0, 1.0, 2.0]),
    "imports Python's": ('def strategy(board):\n    import random\n    return random.choice("WW")', [1.0, 1.0, 2.0]),
    "imports NumPy": ('def strategy(board):\n    from numpy import matmul\n    return "W"', [-0.5, -20.0, 0.0]),
    "no Python": ("def strategy(board):\n    return W W", [-2.0, -20.0, 0.0]),
    "uses a global": ("def strategy(board):\n    return MOVES[0]", [-0.5, 1.0, 0.0]),
    "crashes": ("def strategy(board):\n    return board[99]", [1.0, 1.0, -3.0]),
    "hangs": ("def strategy(board):\n    while True:\n        pass", [1.0, 1.0, -1.0]),
    "cheats": ("def strategy(board):\n    board[0][0] = 2048\n    return board", [1.0, 1.0, 2.0]),
}


def test_the_game_is_scored_as_the_guide_says():
    completions = [[{"role": "assistant", "content": f"```python\n{code}\n```"}] for code, _ in REPLIES.values()]
    completions.append([{"role": "assistant", "content": "I would go left."}])
    expected = [scores for _, scores in REPLIES.values()] + [[-2.0, -1.0, -2.0]]
    rewards = Rewards([function_works, no_cheating, strategy_succeeds])
    batch = rewards.score([[{"role": "user", "content": "Play."}]] * len(completions), completions)
    found = [list(scores) for scores in zip(*(column.values for column in batch.columns), strict=True)]
    assert dict(zip([*REPLIES, "no code"], found, strict=True)) == dict(
        zip([*REPLIES, "no code"], expected, strict=True)
    )
    assert batch.total == [sum(scores) for scores in expected]


def test_the_samples_of_the_guide():
    assert execute_strategy(lambda board: "W", GameBoard(size=8, seed=42, target=2048, probability_fours=0.10))[0] > 1
    function = "def add(a, b):\n    def adder(a):\n        return a + b\n    return adder(b) + b\n"
    assert create_locked_down_function(function)(10, 20) == 60


MATMUL = "def matmul(A, B):\n    columns = list(zip(*B))\n    return [[sum(a * b for a, b in zip(row, column)) "
MATMUL += "for column in columns] for row in A]"


def matrices(seed, size=12):
    numbers = random.Random(seed)
    return tuple([[numbers.random() for _ in range(size)] for _ in range(size)] for _ in "AB")


def is_product(arguments, value):
    a, b = arguments
    right = [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]
    pairs = [(x, y) for got, want in zip(value, right, strict=True) for x, y in zip(got, want, strict=True)]
    return max(abs(x - y) for x, y in pairs) < 1e-9


def test_matrix_products_are_checked_and_timed_by_the_host():
    honest = create_locked_down_function(MATMUL)
    assert is_product(matrices(0), honest(*matrices(0)))
    timing = time_calls(honest, matrices, rounds=3, check=is_product, wipe_bytes=1 << 20)
    assert timing.rounds == 3 and timing.fastest <= timing.seconds < 1
    assert find_memory(honest, [matrices(0), matrices(1)]) == []


def test_slower_functions_take_longer():
    slow = create_locked_down_function("def f(A, B):\n    import time\n    time.sleep(0.05)\n    return 0")
    fast = create_locked_down_function("def f(A, B):\n    return 0")
    times = [time_calls(f, matrices, rounds=3, wipe_bytes=0).seconds for f in (slow, fast)]
    assert times[0] > 0.04 and times[1] < times[0]


def test_changing_the_clock_does_not_help():
    code = "def matmul(A, B):\n    import time\n    time.perf_counter = time.time = lambda: 0.0\n    time.sleep(0.05)\n"
    timing = time_calls(create_locked_down_function(code + "    return A"), matrices, rounds=2, wipe_bytes=0)
    assert timing.seconds > 0.04


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("def f(x, kept={}):\n    kept[x] = kept.get(x) or sum(range(10**6))\n    return kept[x]", "repeated"),
        ("def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)", "after earlier calls"),
        ("def f(x):\n    import random\n    return random.random()", "different results"),
        ("def f(x):\n    return x + 1", None),
    ],
)  # fmt: skip
def test_functions_that_remember_are_found(code, finding):
    found = find_memory(create_locked_down_function(code), [(1,), (2,)])
    assert found == [] if finding is None else finding in found[0]
