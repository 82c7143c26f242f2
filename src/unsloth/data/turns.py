"""Which characters of a rendered conversation are the assistant's: from the structure, not by searching markers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError
from unsloth.data.conversation import Conversation
from unsloth.data.render import ChatRenderer
from unsloth.data.template_engine import Rendered

_PROBES = ("Xq1X", "Xa1X", "Xq2X", "Xa2X")


@dataclass(frozen=True)
class TurnReader:
    """Knows of one chat template what it writes before an assistant's words.

    Attributes:
        headers: What may start an assistant's turn, the longest first: the generation prompt, and shorter forms of
            it in earlier turns. The model does not write it, so it is not trained.
    """

    headers: tuple[str, ...]

    @classmethod
    def of(cls, renderer: ChatRenderer) -> TurnReader | None:
        """Read the template; None if it does not show which message wrote what."""
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, _PROBES, strict=True)]
        try:
            rendered = renderer.render(Conversation(messages), 0)
            asked = renderer.render(Conversation(messages[:1]), 0).text
            prompted = renderer.render(Conversation(messages[:1]), 0, add_generation_prompt=True)
        except DataError:
            return None
        written = {message: rendered.text[start:end] for message, start, end in rendered.turns}
        if any(_PROBES[i] not in written.get(i, "") for i in range(4)):
            return cls(()) if rendered.generated else None
        prompt = prompted.text[prompted.turns[-1][2] :] if prompted.turns else ""
        if not prompt:  # written within the last turn: then it is what the rendering without it lacks
            prompt = prompted.text[len(os.path.commonprefix([asked, prompted.text])) :]
        if not prompt:
            return cls(())
        before = [written[i].split(_PROBES[i])[0] for i in (1, 3)]
        headers = {prompt, *(os.path.commonprefix([prompt, text]) for text in before)}
        return cls(tuple(sorted(filter(None, headers), key=len, reverse=True)))

    def spans(
        self, rendered: Rendered, row: Conversation, number: int, first: int = 0, last_only: bool = False
    ) -> list[tuple[int, int]]:
        """Character ranges ``[start, end)`` that the assistant wrote in ``rendered``, the end of its turns included.

        Args:
            rendered: The rendering of ``row``.
            row: The conversation. A message with ``weight`` 0 is left out, and one that says nothing.
            number: The row, for messages of errors.
            first: The first message to look at.
            last_only: Only the last of the assistant's turns.

        Raises:
            DataError: A weight other than 0 and 1.
        """
        messages = row.messages
        wanted = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        chosen = {
            i
            for i in (wanted[-1:] if last_only else wanted)
            if _weight(messages[i], number, i) and not is_silent(messages[i])
        }
        if not rendered.turns:
            return _by_order(rendered, row, chosen, number)
        spans = []
        for position, (message, start, end) in enumerate(rendered.turns):
            if message not in chosen:
                continue
            if position == len(rendered.turns) - 1 and message == len(messages) - 1:
                end = len(rendered.text)  # what the template writes at the very end, such as the end of text
            spans += self._within(rendered, start, end)
        return spans

    def _within(self, rendered: Rendered, start: int, end: int) -> list[tuple[int, int]]:
        """The trained part of one turn: what the template marks as generated, or all after the header."""
        if rendered.generated:
            return [(max(a, start), min(b, end)) for a, b in rendered.generated if a < end and b > start]
        header = next((h for h in self.headers if rendered.text.startswith(h, start)), "")
        return [(start + len(header), end)]


def end_token(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> str | None:
    """The control token that ends the last trained stretch of a row, if one does."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    tail = [label for label in labels if label >= 0][-3:]
    found = next((label for label in reversed(tail) if label in special), None)
    return None if found is None else tokenizer.convert_ids_to_tokens(found)


def is_silent(message: Mapping[str, Any]) -> bool:
    """Whether a message says, thinks and calls nothing."""
    return not any(message.get(key) for key in ("content", "tool_calls", "thinking", "reasoning_content"))


def _by_order(rendered: Rendered, row: Conversation, chosen: set[int], number: int) -> list[tuple[int, int]]:
    """Which generation blocks are those of the ``chosen`` messages, in a template that only marks these blocks."""
    speakers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if len(speakers) != len(rendered.generated):
        raise DataError(
            f"row {number}: the chat template does not show which of {len(speakers)} answers is which",
            do="Pass instruction_part=... and response_part=... to train_on_responses_only.",
        )
    return [span for span, i in zip(rendered.generated, speakers, strict=True) if i in chosen]


def _weight(message: Mapping[str, Any], number: int, position: int) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(
            f"row {number}, message {position}: a weight must be 0 (not trained) or 1 (trained)", got=weight
        )
    return bool(weight)
