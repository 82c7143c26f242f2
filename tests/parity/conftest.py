"""Lets the tests of this folder import their shared parts (tiny_models)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--write-coverage", action="store_true", help="write docs/families-coverage.md anew")
