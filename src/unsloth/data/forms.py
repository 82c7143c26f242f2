"""Recognizing that a conversation has the same sequence of roles as earlier ones, and what is known of such rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.data.assembly import Assembler, Form
from unsloth.data.batch_tokenizer import BatchTokenizer
from unsloth.data.conversation import Conversation
from unsloth.data.outline import Outline
from unsloth.data.render import ChatRenderer
from unsloth.data.template_engine import Rendered
from unsloth.data.turns import TurnReader

_WORTHWHILE = 3  # rows of a kind after which finding its form pays
_KINDS = 1024  # kinds of rows that are remembered
_LONGEST = 1_000_000  # characters; the limits of rendering are for longer rows
_SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Masking:
    """What of conversations is trained.

    Attributes:
        reader: Knows whose text is whose; None if this is not asked, or not known.
        is_masked: Whether only the assistant's turns are trained.
        last_only: Only the last one.
    """

    reader: TurnReader | None
    is_masked: bool
    last_only: bool = False


@dataclass
class _Kind:
    """Rows that differ in nothing but their texts."""

    seen: int = 0
    known: Form | Outline | None = None


@dataclass(frozen=True)
class Match:
    """What is known of a row.

    Attributes:
        known: Its form, or its outline if the tokenizer's rows cannot be put together.
        texts: What its messages say.
    """

    known: Form | Outline
    texts: list[str]


class Forms:
    """Finds for a conversation the form or outline that rows of its kind have.

    Args:
        tokenizer: The tokenizer.
        batch_tokenizer: The same, to be called.
        renderer: Renders its conversations.
        mask: What is trained.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokenizer: BatchTokenizer,
        renderer: ChatRenderer,
        mask: Masking,
    ) -> None:
        self._renderer = renderer
        self._mask = mask
        self._assembler = Assembler(tokenizer, batch_tokenizer)
        self._kinds: dict[Any, _Kind] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What was found is left behind: a worker process finds it anew."""
        return {**self.__dict__, "_kinds": {}}

    def find(self, row: Conversation, first: int) -> Match | None:
        """What is known of rows such as this one; None if it has to be rendered.

        Args:
            row: The conversation, nothing in it escaped.
            first: The first message that may be trained.
        """
        key = _key(row, first)
        if key is None:
            return None
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= _KINDS:
                return None
            kind = self._kinds[key] = _Kind()
        kind.seen += 1
        if kind.seen == _WORTHWHILE:
            kind.known = self._look(row, first)
        known = kind.known
        if known is None:
            return None
        texts = [message["content"] for message in row.messages]
        if sum(map(len, texts)) > _LONGEST or self._assembler.has_added_tokens(texts) or not known.holds(texts):
            return None
        return Match(known, texts)

    def _look(self, row: Conversation, first: int) -> Form | Outline | None:
        outline = self._renderer.outline(row)
        reader, is_masked = self._mask.reader, self._mask.is_masked or first > 0
        if outline is None or (is_masked and reader is None):
            return outline

        def read(rendered: Rendered, texts: list[str]) -> list[tuple[int, int]]:
            assert reader is not None
            messages = [{**message, "content": text} for message, text in zip(row.messages, texts, strict=True)]
            return reader.spans(rendered, Conversation(messages), 0, first, self._mask.last_only)

        empty = [i for i, message in enumerate(row.messages) if not message["content"]]
        form = self._assembler.form(
            outline, len(row.messages), empty, read if is_masked else None, reader.headers if reader else ()
        )
        return form or outline


def _key(row: Conversation, first: int) -> Any:
    """What a template can make a difference by, the texts left out; None if there is more than can be told."""
    if row.tools is not None:
        return None
    kinds: list[Any] = [first]
    for message in row.messages:
        content = message.get("content")
        if type(content) is not str or next(iter(message)) != "role":
            return None
        if len(message) == 2:
            kinds.append((message["role"], content == ""))
        elif message.keys() == {"role", "content", "weight"}:
            kinds.append((message["role"], content == "", repr(message["weight"])))
        else:
            return None
    variables: Mapping[str, Any] = row.variables or {}
    if not variables:
        return tuple(kinds)
    if not all(isinstance(value, _SCALARS) for value in variables.values()):
        return None
    return tuple(kinds), tuple(sorted((name, repr(value)) for name, value in variables.items()))
