"""Giving a tokenizer a chat template, and the end-of-text token that goes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, TokenizerError
from unsloth.core.log import get_logger
from unsloth.data import template_library
from unsloth.data.template_library import OWN_EOS

_KEYS = ("role", "content")
_ROLES = ("user", "assistant", "system", "tool")
_DEFAULT_SYSTEM = re.compile(r"(\{%-? set default_system_message = ).*?( -?%\})")
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

logger = get_logger(__name__)


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give ``tokenizer`` a chat template.

    Args:
        tokenizer: A tokenizer, or a processor with one; it is changed and returned.
        chat_template: A name of ``CHAT_TEMPLATES``, or ``(template, eos_token)`` with a template in Jinja of your
            own and the word that ends an answer in it; ``"eos_token"`` means the tokenizer's own.
        mapping: How the rows call what the template calls role, content, user, assistant and system, such as
            ``{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}``. The template then
            understands both spellings.
        map_eos_token: Make the template's stop word the end-of-text token. A stop word that the vocabulary lacks
            takes the name of the present end-of-text token and keeps its id, so that nothing needs training.
        system_message: Used for conversations that bring none; replaces the template's own default.

    Returns:
        ``tokenizer``.

    Raises:
        ConfigError: No such template, a mapping with unknown keys, or no place for the system message.
        TokenizerError: The stop word cannot be mapped.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(inner, PreTrainedTokenizerBase):
        raise ConfigError("get_chat_template needs a tokenizer", got=type(tokenizer).__name__)
    text, stop, renames = _template_of(chat_template)
    text = _with_system_message(text, system_message)
    text = _with_mapping(text, mapping or {})
    if map_eos_token:
        for old, new in renames.items():
            _rename(inner, old, new)
        _set_stop(inner, stop)
    elif stop != OWN_EOS and stop not in inner.get_vocab():
        logger.warning(
            "%r ends an answer in this template but is no token of the vocabulary; map_eos_token=True maps it", stop
        )
    for target in {id(t): t for t in (tokenizer, inner)}.values():
        target.chat_template = text
    return tokenizer


def _template_of(chat_template: str | tuple[str, str]) -> tuple[str, str, Mapping[str, str]]:
    """The template's text, its stop word, and tokens to rename."""
    if isinstance(chat_template, str):
        if "{%" in chat_template or "{{" in chat_template:
            return chat_template, OWN_EOS, {}
        found = template_library.find(chat_template)
        return found.text, found.stop, found.renames
    if not isinstance(chat_template, tuple | list) or len(chat_template) != 2:
        raise ConfigError("chat_template must be a name, or (template, eos_token)", got=chat_template)
    text, stop = chat_template
    if not isinstance(text, str) or not isinstance(stop, str) or "{" not in text:
        raise ConfigError("chat_template must be (template in Jinja, eos_token), both text", got=chat_template)
    if stop not in text and OWN_EOS not in text:
        raise ConfigError(
            "the template never writes its eos_token, so a model would not learn to stop",
            got=stop,
            do="Put {{ eos_token }} after the assistant's content.",
        )
    return text, stop, {}


def _with_system_message(text: str, system_message: str | None) -> str:
    if system_message is None:
        return text
    if "{system_message}" in text:
        return text.replace("{system_message}", _escape(system_message))
    literal = f"'{_escape(system_message)}'"
    changed, count = _DEFAULT_SYSTEM.subn(lambda found: found[1] + literal + found[2], text, count=1)
    if not count:
        raise ConfigError(
            "this template has no place for system_message",
            got=system_message,
            do="Write {system_message} into the template, or begin each conversation with a system message.",
        )
    return changed


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")


def _with_mapping(text: str, mapping: Mapping[str, str]) -> str:
    """Let the template read other keys and role names as well as its own."""
    unknown = sorted(set(mapping) - {*_KEYS, *_ROLES})
    if unknown:
        raise ConfigError(f"mapping may have the keys {', '.join((*_KEYS, *_ROLES))}", got=unknown)
    for key in _KEYS:
        other = mapping.get(key, key)
        if other != key:
            item = rf"(\w+(?:\[[^\[\]]*\])?)(?:\[(['\"]){key}\2\]|\.{key}\b)"
            text = re.sub(item, rf"(\1['{other}'] if \1['{other}'] is defined else \1['{key}'])", text)
    for role in _ROLES:
        other = mapping.get(role, role)
        if other != role:
            text = re.sub(rf"==\s*(['\"]){role}\1", f"in ['{role}', '{other}']", text)
            text = re.sub(rf"!=\s*(['\"]){role}\1", f"not in ['{role}', '{other}']", text)
    return text


def _set_stop(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    """Make ``stop`` the end-of-text token."""
    before = tokenizer.eos_token
    if stop in (OWN_EOS, before):
        if before is None:
            raise TokenizerError(
                "this template ends an answer with the tokenizer's end-of-text token, but it has none",
                got=tokenizer.name_or_path,
                do="Set tokenizer.eos_token first.",
            )
        return
    if stop not in tokenizer.get_vocab():
        if before is None:
            raise TokenizerError(
                "the stop word is not in the vocabulary, and there is no end-of-text token to rename",
                got=stop,
                do="Add it with tokenizer.add_special_tokens and resize the model.",
            )
        _rename(tokenizer, before, stop)
        logger.info("the end-of-text token %r is now called %r; its id stays %d", before, stop, tokenizer.eos_token_id)
        return
    tokenizer.eos_token = stop
    if tokenizer.pad_token == stop and before is not None:
        tokenizer.pad_token = before  # padding and end must differ, or a collator may mask the end


def _rename(tokenizer: PreTrainedTokenizerBase, old: str, new: str) -> None:
    """Call the token ``old`` by the name ``new``; every id stays."""
    vocabulary = tokenizer.get_vocab()
    if new in vocabulary or old not in vocabulary:
        return
    if not tokenizer.is_fast:
        raise TokenizerError(
            "renaming a token needs a fast tokenizer", got=type(tokenizer).__name__, do="Pass map_eos_token=False."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = state["model"].pop("merges", None)
    state = _replace(state, old, new)
    if merges is not None:
        state["model"]["merges"] = merges
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    for name in _SPECIAL_NAMES:
        if getattr(tokenizer, name, None) == old:
            setattr(tokenizer, name, new)


def _replace(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {new if key == old else key: _replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, old, new) for item in value]
    return new if value == old else value
