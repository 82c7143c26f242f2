"""Thousands of calls: no memory, descriptor or process is kept of any."""

import gc
import os
from pathlib import Path

import pytest

from unsloth.rewards import create_locked_down_function

SOURCE = "def f(board, text):\n    print(text)\n    return [sum(row) for row in board] + [len(text)]"
LONG = pytest.param(10_000, 10_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])
BOARD = [[2, 4, 8, 16]] * 4


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def expected(number):
    return [30] * 4 + [len(str(number))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
@pytest.mark.parametrize(("calls", "new_functions"), [(260, 40), LONG])
def test_nothing_accumulates(calls, new_functions):
    function = create_locked_down_function(SOURCE)
    for number in range(20):
        function(BOARD, str(number))
    create_locked_down_function(SOURCE)(BOARD, "")
    gc.collect()
    memory, descriptors = resident_bytes(), len(os.listdir("/proc/self/fd"))
    for number in range(calls):
        assert function(BOARD, str(number)) == expected(number)
    for number in range(new_functions):
        assert create_locked_down_function(SOURCE)(BOARD, str(number)) == expected(number)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_bytes() - memory < 20 << 20
