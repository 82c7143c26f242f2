"""Lets the tests of this folder import their shared parts (grpo_trainers)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
