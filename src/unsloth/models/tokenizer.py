"""Tokenizers: loading, and the defaults that training scripts expect of them."""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core.log import get_logger

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

logger = get_logger(__name__)


def load(
    location: str,
    *,
    max_seq_length: int,
    fix: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter folder, or of a hub repository.

    Args:
        location: Folder or hub id.
        max_seq_length: Becomes ``model_max_length``, in tokens.
        fix: Give the tokenizer a padding token of its own where it has none, or shares it with the end of text.
        revision: Hub revision.
        token: Hub token.
        trust_remote_code: Whether code in the repository may run.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        location, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
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
    """Tell the model's configuration which token its tokenizer pads with."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _apply_chat_template(self: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> Any:
    """The method of transformers with its earlier default: token ids rather than a mapping.

    Bound to the instance, so that ``len(tokenizer.apply_chat_template(messages))`` counts tokens.
    """
    kwargs.setdefault("return_dict", False)
    return type(self).apply_chat_template(self, *args, **kwargs)
