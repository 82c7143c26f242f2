"""Time of sandboxed calls: python bench/rewards.py [calls] [new functions]"""

import statistics
import sys
import time

from unsloth.rewards import create_locked_down_function

SOURCE = "def strategy(board):\n    return 'W' if board[0][0] else 'A'"
MATMUL = (
    "def matmul(A, B):\n    columns = list(zip(*B))\n"
    "    return [[sum(a * b for a, b in zip(row, column)) for column in columns] for row in A]"
)
BOARD = [[0, 2, 4, 8, 16, 32]] * 6


def timed(action, count):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def report(name, times):
    ordered = sorted(times)
    print(
        f"{name:40} median {statistics.median(ordered) * 1e3:8.3f} ms, "
        f"95 % below {ordered[len(ordered) * 95 // 100] * 1e3:8.3f} ms, {len(times) / sum(times):7,.0f} a second"
    )


def main():
    calls, functions = (int(number) for number in [*sys.argv[1:], "5000", "200"][:2])
    strategy = create_locked_down_function(SOURCE)
    report("call with a 6 x 6 board", timed(lambda: strategy(BOARD), calls))
    big = [[0.5] * 128] * 128
    echo = create_locked_down_function("def f(x):\n    return x")
    report("call with 128 x 128 floats both ways", timed(lambda: echo(big), calls // 50))
    report("new function and its first call", timed(lambda: create_locked_down_function(SOURCE)(BOARD), functions))


if __name__ == "__main__":
    main()
