"""Kernel tests without pytest's machinery, under compute-sanitizer, in the time that there is.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/sanitize.py \
        --seconds 60 rms_norm layer_norm

runs the first case of every test of test_rms_norm.py and test_layer_norm.py, then the second of each, until all have
run or the seconds are over; then it ends by itself, so that the tool gives its summary. Without the caching of memory
every tensor is an allocation, and an access beside it is found. Prints the kernels that were launched.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import conftest  # noqa: F401  it chooses between the GPU and the interpreter, before any kernel is imported
import pytest
import torch
from launches import kernels

_PARAM = type(pytest.param(0))
_FIXTURES = {"device": lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")}


def cases(test: Callable[..., None]) -> list[dict[str, Any]]:
    """Keyword arguments of each case of a test; none if it takes a fixture that is not known here, or is skipped."""
    tables = []
    if any(mark.name == "skipif" and mark.args[0] for mark in getattr(test, "pytestmark", [])):
        return []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows = mark.args[:2]
            bare = isinstance(names, str) and "," not in names  # then a row is the value itself
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            rows = [tuple(row.values) if isinstance(row, _PARAM) else (row,) if bare else row for row in rows]
            tables.append([dict(zip(names, row, strict=True)) for row in rows])
    found = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*tables)]
    missing = set(inspect.signature(test).parameters) - set(found[0])
    return [] if missing - set(_FIXTURES) else [{**case, **{n: _FIXTURES[n]() for n in missing}} for case in found]


def in_turn(names: list[str]) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    """The cases of all tests: the first of each, the second of each, and so on."""
    tests = []
    for name in names:
        module = importlib.import_module(f"test_{name}")
        own = [f for n, f in vars(module).items() if n.startswith("test_") and f.__module__ == module.__name__]
        tests += [[(f"{name}.{f.__name__}", f, case) for case in cases(f)] for f in own]
    for turn in itertools.zip_longest(*tests):
        yield from (case for case in turn if case is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="tests/kernels/test_NAME.py")
    parser.add_argument("--seconds", type=float, default=60, help="from the start of the first case")
    options = parser.parse_args()

    launched: set[str] = set()
    for (_, name), kernel in kernels().items():
        kernel.add_pre_run_hook(lambda *_, name=name, **__: launched.add(name))
    everything = list(in_turn(options.names))
    start, ran, failed, skipped = time.monotonic(), 0, [], 0

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    for name, test, case in everything:
        try:
            torch.manual_seed(0)
            test(**case)
            ran += 1
        except pytest.skip.Exception:
            skipped += 1
        except Exception as error:  # noqa: BLE001  counted and shown
            if time.monotonic() - start >= options.seconds:
                break  # the alarm, or what it was wrapped in
            failed.append(name)
            print(f"{name} {case}: {type(error).__name__}: {str(error)[:300]}", flush=True)  # noqa: T201
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(  # noqa: T201
        f"{' '.join(options.names)}: {ran} of {len(everything)} cases passed, {len(failed)} failed, {skipped} skipped, "
        f"{time.monotonic() - start:.0f} s; launched {' '.join(sorted(launched))}",
        flush=True,
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
