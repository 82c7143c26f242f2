"""Reward functions, their composition, and a sandbox for generated code.

A reward function is ``f(prompts, completions, **columns) -> list[float]``. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    name: f"unsloth.rewards.{module}"
    for module, names in {
        "call": ("RewardColumn", "call_reward"),
        "code_answer": ("code_tests", "equal", "extract_code", "standard_imports_only"),
        "completions": ("from_column", "from_text", "text_of"),
        "compose": ("RewardBatch", "RewardStatistics", "Rewards"),
        "hacking": ("Timing", "find_memory", "no_globals", "time_calls"),
        "model_judge": ("Endpoint", "judge"),
        "locked_down": ("create_locked_down_function",),
        "math_answer": ("correctness", "final_answer", "integer", "number_detected", "parse_number", "proximity"),
        "sandbox": ("Outcome", "SandboxConfig", "SandboxedFunction"),
        "source_check": ("AVAILABLE", "check_python_modules"),
        "text_format": (
            "contains",
            "exact_match",
            "keyword",
            "length",
            "signature",
            "soft_format",
            "strict_format",
            "xml_count",
        ),
        "text_quality": ("LANGUAGES", "detect_language", "gibberish", "language"),
        "time_limit": ("execute_with_time_limit",),
    }.items()
    for name in names
}

__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unsloth.rewards' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
