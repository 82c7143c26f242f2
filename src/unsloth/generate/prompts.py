"""What a prompt may be, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unsloth.core.errors import ConfigError
from unsloth.generate.protocol import Prompt

_FORMS = "Pass a text, token ids, a chat (a list of messages), or embeddings (tokens, hidden size)."


@dataclass(frozen=True)
class Encoded:
    """A prompt as the engine takes it.

    Attributes:
        text: As it was given, or None.
        ids: Its tokens; -1 for each position of embeddings.
        embeddings: (T, K), or None.
    """

    text: str | None
    ids: list[int]
    embeddings: torch.Tensor | None = None


def encode(prompt: Prompt, tokenizer: Any, vocabulary: int, hidden: int) -> Encoded:
    """Read one prompt.

    Args:
        prompt: See :data:`unsloth.generate.protocol.Prompt`.
        tokenizer: Of transformers, or None where only token ids and embeddings come.
        vocabulary: Token ids are below it.
        hidden: Width of embeddings.

    Raises:
        ConfigError: It is none of the forms, or empty.
    """
    found = _encode(prompt, tokenizer, hidden)
    if not found.ids:
        raise ConfigError("the prompt is empty", got=prompt, do="It must have one token at least.")
    if found.embeddings is None and not 0 <= min(found.ids) <= max(found.ids) < vocabulary:
        bad = next(i for i in found.ids if not 0 <= i < vocabulary)
        raise ConfigError(f"token ids must be from 0 to {vocabulary - 1}", got=bad)
    return found


def check_text(text: str) -> str:
    """The text itself; a ConfigError if it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            "the text is not Unicode", got=ascii(text[error.start]), do="Remove the lone half of a surrogate pair."
        ) from None
    return text


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a sequence of them."""
    if isinstance(prompts, str | Mapping):
        return True
    if isinstance(prompts, torch.Tensor):
        return prompts.dim() == 1 or (prompts.is_floating_point() and prompts.dim() == 2)
    first = next(iter(prompts), None)
    return _is_id(first) or (isinstance(first, Mapping) and "role" in first)


def _encode(prompt: Any, tokenizer: Any, hidden: int) -> Encoded:
    if isinstance(prompt, Mapping):
        given = prompt.get("prompt_token_ids", prompt.get("prompt_embeds", prompt.get("prompt")))
        if given is None or isinstance(given, Mapping):
            raise ConfigError("the prompt has neither prompt nor prompt_token_ids", got=sorted(prompt), do=_FORMS)
        found = _encode(given, tokenizer, hidden)
        text = prompt.get("prompt")
        return Encoded(text if isinstance(text, str) else None, found.ids, found.embeddings)
    if isinstance(prompt, str):
        return Encoded(prompt, list(_require(tokenizer)(check_text(prompt))["input_ids"]))
    if isinstance(prompt, torch.Tensor):
        return _tensor(prompt, hidden)
    if isinstance(prompt, Sequence) and all(_is_id(i) for i in prompt):
        return Encoded(None, [int(i) for i in prompt])
    if isinstance(prompt, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        text = _require(tokenizer).apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return Encoded(None, list(tokenizer(check_text(text), add_special_tokens=False)["input_ids"]))
    raise ConfigError("no prompt", got=prompt, do=_FORMS)


def _tensor(prompt: torch.Tensor, hidden: int) -> Encoded:
    if prompt.is_floating_point():
        if prompt.dim() != 2 or prompt.shape[1] != hidden:
            raise ConfigError(
                "embeddings have the wrong shape", got=tuple(prompt.shape), do=f"Pass (tokens, {hidden})."
            )
        return Encoded(None, [-1] * prompt.shape[0], prompt.detach())
    if prompt.dim() != 1:
        raise ConfigError("token ids must be one row", got=tuple(prompt.shape), do=_FORMS)
    return Encoded(None, prompt.tolist())


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) or type(value).__module__ == "numpy"


def _require(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ConfigError("the engine has no tokenizer", do="Give it one, or pass token ids.")
    return tokenizer
