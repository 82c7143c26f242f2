"""Many sandboxes at once, a quarter of them hostile: nobody waits for the others, and nothing is left behind."""

import gc
import os
import runpy
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unsloth.rewards import SandboxConfig, SandboxedFunction, create_locked_down_function

PROGRAMS = runpy.run_path(str(Path(__file__).with_name("hostile_programs.py")))["PROGRAMS"]
HOSTILE = ("slow_loop_in_c", "os_exit", "spoof_garbage", "memory_list")
CONFIG = SandboxConfig(seconds=3.0)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def children():
    tasks = Path("/proc/self/task")
    return [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.soak)])
def test_concurrent_calls(count):
    gc.collect()
    before = descriptors(), children(), set(os.listdir(tempfile.gettempdir()))

    def work(number):
        if number % 4 == 0:
            config = SandboxConfig(seconds=0.3)
            return SandboxedFunction(PROGRAMS[HOSTILE[number // 4 % 4]], "f", config=config).run(number).status
        function = create_locked_down_function(f"def f(x):\n    return x * {number}", config=CONFIG)
        return [function(x) for x in range(20)] == [x * number for x in range(20)]

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(work, range(count)))
    assert all(result is True for number, result in enumerate(results) if number % 4)
    assert set(results[::4]) == {"timeout", "killed", "error"}
    gc.collect()
    after = descriptors(), children(), set(os.listdir(tempfile.gettempdir()))
    assert after[:2] == before[:2]
    assert not {name for name in after[2] - before[2] if "unsloth" in name}


def test_one_function_called_from_many_threads():
    function = create_locked_down_function("def f(x):\n    return x + 1")
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(function, range(400))) == list(range(1, 401))


def test_a_fork_of_the_host_has_a_child_of_its_own():
    function = create_locked_down_function("def f(x):\n    return x + 1")
    assert function(1) == 2
    read, write = os.pipe()
    process = os.fork()
    if process == 0:  # as the workers of a data loader are made
        os.write(write, str(function(10)).encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert os.read(read, 100) == b"11"
    os.close(read)
    os.close(write)
    assert function(2) == 3
