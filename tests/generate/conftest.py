"""Lets the tests of this folder import the tiny models of tests/parity."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions


@pytest.fixture(scope="session")
def model():
    """A tiny llama in float32; not to be changed."""
    import tiny_families

    return tiny_families.build("llama").eval()


@pytest.fixture
def make_engine(model, tokenizer):
    """``make_engine(**options)``: an engine on the tiny llama, with the byte-level tokenizer."""

    def make(**options):
        return Engine(model, tokenizer, EngineOptions(**{"page_size": 4, "max_num_seqs": 8, **options}))

    return make
