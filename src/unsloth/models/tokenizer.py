"""Tokenizers: loading, and the defaults that training scripts expect of them."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core.errors import TokenizerError
from unsloth.core.log import get_logger
from unsloth.models import remote_code

# Tokens that mean "nothing" in the families that have them; never part of a rendered conversation.
_PADDING_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
)

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_LARGEST_TEMPLATE = 1 << 20  # bytes

logger = get_logger(__name__)


def folder_for(location: str, base_location: str) -> str:
    """Which folder's tokenizer to load: the adapter's own if it has one, else its base model's."""
    has_one = any((Path(location) / name).is_file() for name in _VOCABULARIES)
    return location if has_one else base_location


def load(
    location: str,
    *,
    max_seq_length: int,
    fix: bool = True,
    trust_remote_code: bool = False,
    template_folder: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter folder.

    Args:
        location: The folder.
        max_seq_length: Becomes ``model_max_length``, in tokens.
        fix: Give the tokenizer a padding token of its own where it has none, or shares it with the end of text.
        trust_remote_code: Whether code in the folder may run.
        template_folder: A folder whose ``chat_template.jinja``, if there is one, replaces the tokenizer's.

    Raises:
        TokenizerError: There is none, or it cannot be read.
        ConfigError: It needs code of its own, which was not allowed.
    """
    if not any((Path(location) / name).is_file() for name in (*_VOCABULARIES, "tokenizer_config.json")):
        raise TokenizerError(
            "the model's folder has no tokenizer",
            got=location,
            do="Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise remote_code.explain(location, location, error) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(
            f"the tokenizer in {location} cannot be read: {reason}", do="Copy or download its files again."
        ) from error
    if template_folder is not None and template_folder != location:
        _take_template(tokenizer, Path(template_folder) / "chat_template.jinja")
    tokenizer.model_max_length = max_seq_length
    tokenizer.padding_side = "right"
    tokenizer.apply_chat_template = MethodType(_apply_chat_template, tokenizer)
    if fix:
        separate_padding_token(tokenizer)
    return tokenizer


def separate_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose an existing token for padding if there is none, or if it is also the end-of-text token.

    A collator that masks padding by its id would otherwise never train the end of a text. No token is added; a
    tokenizer without a spare one keeps what it has.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    candidates = [*_PADDING_CANDIDATES, tokenizer.unk_token]
    spare = next((token for token in candidates if token in vocabulary and token not in taken), None)
    if spare is not None:
        tokenizer.pad_token = spare
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning("the tokenizer has no spare token for padding; %r is used for it", tokenizer.eos_token)


def share_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model which token its tokenizer pads with, and say where the two disagree on the end of a text."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)  # AutoModel's classes have none
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    given = generation.eos_token_id if generation is not None else model.config.get_text_config().eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    if tokenizer.eos_token_id is None:
        known = tokenizer.convert_ids_to_tokens(ends) if ends else []
        logger.warning(
            "the tokenizer has no eos_token, so the end of an answer cannot be trained%s",
            f"; the model stops at {known[0]!r}: set tokenizer.eos_token to it" if known else "",
        )
    elif ends and tokenizer.eos_token_id not in ends:
        logger.warning(
            "the tokenizer ends a text with %r, but the model's generation stops at %s",
            tokenizer.eos_token,
            ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ends)),
        )


def _take_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    if not path.is_file():
        return
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise TokenizerError(f"{path} is too large for a chat template ({path.stat().st_size:,} bytes)")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def _apply_chat_template(self: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> Any:
    """The method of transformers with its earlier default: token ids rather than a mapping.

    Bound to the instance, so that ``len(tokenizer.apply_chat_template(messages))`` counts tokens.
    """
    kwargs.setdefault("return_dict", False)
    return type(self).apply_chat_template(self, *args, **kwargs)
