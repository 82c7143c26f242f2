"""Many texts to token ids at once, on all cores, with what is not asked for left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Plain:
    """What a tokenizer without a fast implementation makes of a text.

    Attributes:
        ids: Token ids.
    """

    ids: list[int]


class BatchTokenizer:
    """Calls a fast tokenizer's Rust part directly, as transformers does in the end, without its bookkeeping.

    Args:
        tokenizer: Any tokenizer; one that has a way of its own to encode is asked in its own way.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        self.is_direct = (
            tokenizer.is_fast
            and getattr(kind, "_encode_plus", None) is getattr(PreTrainedTokenizerFast, "_encode_plus", kind)
            and kind.__call__ is PreTrainedTokenizerBase.__call__
        )
        """Whether ids come from the Rust part alone."""

    def encode(self, texts: Sequence[str], begin: bool, offsets: bool) -> list[Any]:
        """Encodings with ``ids``, one for each text.

        Args:
            texts: The texts.
            begin: Add the special tokens that the tokenizer puts around a text, such as that of its beginning.
            offsets: Whether the encodings are asked where their tokens come from (``tokenizers.Encoding``).
        """
        if not texts:
            return []
        if not self.is_direct:
            return self._asked(list(texts), begin)
        rust = self._tokenizer.backend_tokenizer
        if rust.truncation is not None:
            rust.no_truncation()
        if rust.padding is not None:
            rust.no_padding()
        split = bool(self._tokenizer.split_special_tokens)
        if rust.encode_special_tokens != split:
            rust.encode_special_tokens = split
        encode = rust.encode_batch if offsets else rust.encode_batch_fast
        return list(encode(texts, add_special_tokens=begin))

    def _asked(self, texts: list[str], begin: bool) -> list[Any]:
        batch = self._tokenizer(texts, add_special_tokens=begin, return_attention_mask=False, verbose=False)
        return batch.encodings or [Plain(ids) for ids in batch["input_ids"]]
