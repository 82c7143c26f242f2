"""Kernel tests run on the GPU where there is one, and under Triton's interpreter on the CPU otherwise."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by @triton.jit, so before any kernel is imported
sys.path.insert(0, str(Path(__file__).parent))  # check_op


@pytest.fixture(scope="session", autouse=True)
def launches() -> Iterator[None]:
    """What the interpreter ran in these tests, the compiler takes as well."""
    if torch.cuda.is_available():
        yield
        return
    from launches import Recorder

    recorder = Recorder()
    yield
    problems = recorder.problems()
    assert not problems, problems


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
