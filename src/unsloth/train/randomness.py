"""The state of every random generator that training draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def capture() -> State:
    """The states of Python's, NumPy's and torch's generators, on the CPU and on every CUDA device in use."""
    state: State = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: State) -> None:
    """Set the generators to a captured state; CUDA devices that it does not know are left alone."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, part in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(part, device)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give the generators their present state back when the block ends, whatever it drew."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
