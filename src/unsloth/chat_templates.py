"""Chat templates and the ways from rows to conversations, under the names that documented snippets import."""

from __future__ import annotations

from typing import Any

from unsloth.data.custom_template import apply_chat_template, construct_chat_template
from unsloth.data.sharegpt import standardize_data_formats, standardize_sharegpt, to_sharegpt
from unsloth.data.template_library import CHAT_TEMPLATES
from unsloth.data.template_setup import get_chat_template

__all__ = [  # noqa: F822
    "CHAT_TEMPLATES",
    "apply_chat_template",
    "construct_chat_template",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    if name == "train_on_responses_only":  # needs the trainers, which take long to import
        from unsloth.train.responses import train_on_responses_only

        return train_on_responses_only
    raise AttributeError(f"module 'unsloth.chat_templates' has no attribute '{name}'")
