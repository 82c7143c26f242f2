"""The chat templates that ship with the library, by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources

from unsloth.core.errors import ConfigError

OWN_EOS = "eos_token"
"""In place of a stop word: the tokenizer's own end-of-text token."""


@dataclass(frozen=True)
class LibraryTemplate:
    """One template.

    Attributes:
        file: Its file in ``data/templates``, without ``.jinja``.
        stop: The token that ends an assistant's turn, or :data:`OWN_EOS`.
        renames: Tokens that are given another name, for a format whose tokens the vocabulary lacks.
    """

    file: str
    stop: str = OWN_EOS
    renames: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The template in Jinja."""
        return resources.files("unsloth.data.templates").joinpath(f"{self.file}.jinja").read_text(encoding="utf-8")


_GEMMA_AS_CHATML = LibraryTemplate("gemma_chatml", "<|im_end|>", {"<start_of_turn>": "<|im_start|>"})
_LIBRARY = {
    "unsloth": LibraryTemplate("unsloth"),
    "zephyr": LibraryTemplate("zephyr"),
    "chatml": LibraryTemplate("chatml", "<|im_end|>"),
    "mistral": LibraryTemplate("mistral"),
    "llama": LibraryTemplate("llama"),
    "vicuna": LibraryTemplate("vicuna"),
    "vicunaold": LibraryTemplate("vicuna_old"),
    "alpaca": LibraryTemplate("alpaca"),
    "gemma": LibraryTemplate("gemma", "<end_of_turn>"),
    "gemmachatml": _GEMMA_AS_CHATML,
    "gemma2": LibraryTemplate("gemma", "<end_of_turn>"),
    "gemma2chatml": _GEMMA_AS_CHATML,
    "llama3": LibraryTemplate("llama-3", "<|eot_id|>"),
    "phi3": LibraryTemplate("phi-3", "<|end|>"),
    "phi35": LibraryTemplate("phi-3.5", "<|end|>"),
    "llama31": LibraryTemplate("llama-3.1", "<|eot_id|>"),
    "llama32": LibraryTemplate("llama-3.2", "<|eot_id|>"),
    "llama33": LibraryTemplate("llama-3.1", "<|eot_id|>"),
    "qwen25": LibraryTemplate("qwen-2.5", "<|im_end|>"),
    "phi4": LibraryTemplate("phi-4", "<|im_end|>"),
    "gemma3": LibraryTemplate("gemma-3", "<end_of_turn>"),
    "gemma3n": LibraryTemplate("gemma-3n", "<end_of_turn>"),
    "qwen3": LibraryTemplate("qwen-3", "<|im_end|>"),
    "gptoss": LibraryTemplate("gpt-oss", "<|return|>"),
}

# The documented spellings, in the documented order; find() knows more.
NAMES = (
    *("unsloth", "zephyr", "chatml", "mistral", "llama", "vicuna", "vicuna_old", "vicuna old", "alpaca"),
    *("gemma", "gemma_chatml", "gemma2", "gemma2_chatml", "llama-3", "llama3", "phi-3", "phi-35", "phi-3.5"),
    *("llama-3.1", "llama-31", "llama-3.2", "llama-3.3", "llama-32", "llama-33"),
    *("qwen-2.5", "qwen-25", "qwen25", "qwen2.5", "phi-4", "gemma-3", "gemma3", "gemma-3n", "gemma3n"),
    *("qwen-3", "qwen3", "gpt-oss", "gptoss"),
)


def find(name: str) -> LibraryTemplate:
    """The template called ``name``; case, spaces, dots, hyphens and underscores make no difference.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    found = _LIBRARY.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            "there is no chat template of this name",
            got=name,
            do=f"{hint}list(CHAT_TEMPLATES) has all names; a template of your own is passed as (template, eos_token).",
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]+", "", name.lower())


class _ChatTemplates(Mapping[str, tuple[str, str]]):
    """From each name to ``(template, stop word)``, which ``get_chat_template`` takes too."""

    def __getitem__(self, name: str) -> tuple[str, str]:
        if not isinstance(name, str) or _plain(name) not in _LIBRARY:
            raise KeyError(name)
        template = find(name)
        return template.text, template.stop

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


CHAT_TEMPLATES: Mapping[str, tuple[str, str]] = _ChatTemplates()
