"""The tokenizer of a model in llama.cpp's words.

Everything is read from ``tokenizer.json``, which is what transformers keeps in memory and saves. It has two kinds that
llama.cpp reads: byte-level BPE (``gpt2`` there), and SentencePiece's BPE with bytes for what has no token (``llama``
there). For the second llama.cpp wants a score of each token, the higher the sooner merged; ``tokenizer.json`` has the
merges in order instead, from which the scores follow: minus the place of the first merge that yields the token.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType, Keys, TokenType
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import TokenizerError
from unsloth.export.gguf import pre_tokenizers
from unsloth.export.gguf import template as chat
from unsloth.export.gguf.metadata import BOOL, INTEGER, TEXT, Metadata

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_MERGED = -1e6
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_role|>")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        model: llama.cpp's name of the kind.
        pre_tokenizer: llama.cpp's name of the way in which words are cut; for byte-level BPE only.
        tokens: Text of each token.
        types: Kind of each token.
        scores: Of each token, for SentencePiece.
        merges: In order, for byte-level BPE.
        space_prefix: Whether a space is put before a text, for SentencePiece.
        composes: Whether the tokenizer composes signs first (Unicode's NFC), which llama.cpp does not.
    """

    model: str
    pre_tokenizer: str | None
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool | None
    composes: bool = False

    def is_known_gap(self, text: str) -> bool:
        """Whether llama.cpp is known to cut this text into other tokens, although everything is said to it rightly."""
        if self.composes and unicodedata.normalize("NFC", text) != text:
            return True
        marked = any(unicodedata.category(sign).startswith("M") for sign in text)
        return marked and self.pre_tokenizer in pre_tokenizers.WITHOUT_MARKS

    @property
    def limits(self) -> list[str]:
        """The same in sentences."""
        found = []
        if self.composes:
            found.append("llama.cpp does not compose signs (Unicode NFC) as the tokenizer does")
        if self.pre_tokenizer in pre_tokenizers.WITHOUT_MARKS:
            found.append("llama.cpp cuts words with combining marks (Hindi, Thai) into other tokens")
        return found


def read(tokenizer: PreTrainedTokenizerBase, rows: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the rows of the token embedding.

    Args:
        tokenizer: A fast one.
        rows: Of the token embedding.
        pre_tokenizer: Name of the way in which words are cut, instead of what is found.

    Raises:
        TokenizerError: A kind of tokenizer that llama.cpp does not read, or more tokens than rows.
    """
    content = _content(tokenizer)
    model = content["model"]
    tokens: list[str | None] = [None] * rows
    types = [TokenType.UNUSED] * rows
    for text, number in _entries(model, content, rows):
        tokens[number] = text
        types[number] = _type(text, model)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model.get("unk_token") is not None:
        types[tokenizer.convert_tokens_to_ids(model["unk_token"])] = TokenType.UNKNOWN
    filled = [f"[PAD{number}]" if text is None else text for number, text in enumerate(tokens)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if _is_byte_level(content):
        words = pre_tokenizer or pre_tokenizers.name(content)
        # llama.cpp refuses a file without merges; this one joins two tokens that never stand side by side.
        joined = [" ".join(merge) for merge in merges] or [f"{filled[0]} {filled[0]}"]
        return Vocabulary("gpt2", words, filled, types, None, joined, None, _composes(content))
    if not model.get("byte_fallback"):
        raise _unreadable("BPE that is neither byte-level nor falls back to bytes")
    prefix = _puts_space_before(content)
    scores = _scores(merges, filled, types)
    return Vocabulary("llama", "default", filled, types, scores, None, prefix, _composes(content))


def add(made: Metadata, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Put the tokenizer into the metadata.

    Args:
        made: Is added to.
        vocabulary: Of the tokenizer.
        tokenizer: Its special tokens and its chat template are written.
        ends: Ids of the tokens at which generation stops, the tokenizer's own first.
    """
    made.add(Keys.Tokenizer.MODEL, vocabulary.model, TEXT)
    made.add(Keys.Tokenizer.PRE, vocabulary.pre_tokenizer, TEXT)
    made.add(Keys.Tokenizer.LIST, vocabulary.tokens, GGUFValueType.ARRAY)
    made.add(Keys.Tokenizer.SCORES, vocabulary.scores, GGUFValueType.ARRAY)
    made.add(Keys.Tokenizer.TOKEN_TYPE, [int(kind) for kind in vocabulary.types], GGUFValueType.ARRAY)
    made.add(Keys.Tokenizer.MERGES, vocabulary.merges, GGUFValueType.ARRAY)
    made.add(Keys.Tokenizer.ADD_PREFIX, vocabulary.space_prefix, BOOL)
    special = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: ends[0] if ends else None,
        Keys.Tokenizer.EOT_ID: _end_of_turn(tokenizer, ends),
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    for key, number in special.items():
        made.add(key, number, INTEGER)
    made.limits += vocabulary.limits
    adds_first, adds_last = _added_around(tokenizer)
    made.add(Keys.Tokenizer.ADD_BOS, adds_first, BOOL)
    made.add(Keys.Tokenizer.ADD_EOS, adds_last, BOOL)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    made.add(Keys.Tokenizer.CHAT_TEMPLATE, template or None, TEXT)
    made.limits += chat.limits(template)


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unreadable(f"a tokenizer in Python ({type(tokenizer).__name__})")
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise _unreadable(content["model"]["type"])
    return content


def _unreadable(kind: str) -> TokenizerError:
    return TokenizerError(
        "this kind of tokenizer has no rule for GGUF", got=kind, do="Save the model with save_pretrained_merged."
    )


def _entries(model: dict[str, Any], content: dict[str, Any], rows: int) -> list[tuple[str, int]]:
    entries = list(model["vocab"].items())
    largest = max([number for _, number in entries] + [added["id"] for added in content["added_tokens"]])
    if largest >= rows:
        raise TokenizerError(
            f"the tokenizer has tokens up to number {largest:,}, the model's embedding {rows:,} rows",
            do="Add tokens with add_new_tokens(model, tokenizer, ...), which gives the model rows for them.",
        )
    return entries


def _type(text: str, model: dict[str, Any]) -> TokenType:
    if model.get("byte_fallback") and _BYTE.fullmatch(text):
        return TokenType.BYTE
    return TokenType.NORMAL


def _is_byte_level(content: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])


def _composes(content: dict[str, Any]) -> bool:
    return '"NFC"' in json.dumps(content.get("normalizer"))


def _puts_space_before(content: dict[str, Any]) -> bool:
    """Whether SentencePiece's mark for a space is put before a text."""
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps


def _scores(merges: list[list[str]], tokens: list[str], types: list[TokenType]) -> list[float]:
    places: dict[str, int] = {}
    for left, right in merges:
        places.setdefault(left + right, len(places))
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind is not TokenType.NORMAL:
            scores.append(0.0)
        elif token in places:
            scores.append(-float(places[token]))
        else:  # a single character, or a token that no merge yields
            scores.append(_NEVER_MERGED)
    return scores


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int | None:
    """The token that ends a turn, if it is another than the one that ends a text."""
    known = tokenizer.get_vocab()
    named = [known[text] for text in _ENDS_OF_TURN if text in known and text in (tokenizer.chat_template or "")]
    return next((number for number in [*named, *ends[1:]] if number not in ends[:1]), None)


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last behind it."""
    ids = tokenizer("a").input_ids
    first = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    last = len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return first, last
