"""Which tokens are trained: labels equal the token ids there, and IGNORED elsewhere."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, TokenizerError

IGNORED = -100
"""The label of a token that is not trained, as in torch and transformers."""


@dataclass(frozen=True)
class ResponseMarkers:
    r"""The texts by which turns are told apart in a rendered conversation.

    Attributes:
        instruction: Starts a user's turn, such as ``"<|im_start|>user\n"``.
        response: Starts an assistant's turn. What follows it is trained, up to the next user's turn; the
            end-of-turn token is part of that.
    """

    instruction: str
    response: str

    def __post_init__(self) -> None:
        for name, value in (("instruction_part", self.instruction), ("response_part", self.response)):
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"{name} must be the text that starts a turn", got=value)


def find_markers(tokenizer: PreTrainedTokenizerBase) -> ResponseMarkers:
    """Read the markers off the tokenizer's chat template, by rendering a conversation of known words.

    Raises:
        TokenizerError: The template has no recognizable markers.
    """
    users, assistants = ("Xu1X", "Xu2X"), ("Xa1X", "Xa2X")
    turns = [
        {"role": role, "content": text}
        for pair in zip(users, assistants, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    positions = [text.find(turn["content"]) for turn in turns]
    if -1 in positions or positions != sorted(positions):
        raise _no_markers(tokenizer)
    gaps = [text[start + 4 : end] for start, end in zip(positions, positions[1:], strict=False)]
    tail = text[positions[-1] + 4 :]
    # What ends a turn comes before the marker in every gap: it belongs to the turn before.
    end_of_turn = os.path.commonprefix([gaps[1], tail])
    instruction, response = gaps[1].removeprefix(end_of_turn), gaps[0].removeprefix(end_of_turn)
    if not instruction.strip() or not response.strip() or gaps[2] != gaps[0]:
        raise _no_markers(tokenizer)
    return ResponseMarkers(instruction, response)


def response_spans(text: str, markers: ResponseMarkers) -> list[tuple[int, int]]:
    """Character ranges ``[start, end)`` of the assistant's turns in a rendered conversation."""
    spans = []
    start = text.find(markers.response)
    while start != -1:
        start += len(markers.response)
        end = text.find(markers.instruction, start)
        end = len(text) if end == -1 else end
        spans.append((start, end))
        start = text.find(markers.response, end)
    return spans


def label_spans(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], swallowing: Container[int] = ()
) -> list[int]:
    """Labels for one row: a token is trained if one of its characters lies within ``spans``.

    So is a token that begins in a header and goes on into the answer, such as that of `` Hello`` after
    ``Assistant: ``: else the first word of an answer would not be learned.

    Args:
        ids: Token ids.
        offsets: For each token its characters ``[start, end)`` in the text; ``(0, 0)`` for an added token.
        spans: Sorted, disjoint character ranges to train.
        swallowing: Tokens that take the white space after them in; those of a header are not trained for that.
    """
    labels = [IGNORED] * len(ids)
    current = 0
    for position, (start, end) in enumerate(offsets):
        while current < len(spans) and start >= spans[current][1]:
            current += 1
        if current == len(spans) or end == start or end <= spans[current][0]:
            continue
        if start >= spans[current][0] or ids[position] not in swallowing:
            labels[position] = ids[position]
    return labels


def label_encoding(
    ids: list[int], encoding: Any, spans: list[tuple[int, int]], swallowing: Container[int] = ()
) -> list[int]:
    """As :func:`label_spans`, from the encoding of a fast tokenizer: only the ends of spans are looked up.

    Args:
        ids: Token ids.
        encoding: The ``tokenizers.Encoding`` they are from.
        spans: Sorted, disjoint character ranges to train.
        swallowing: As there.
    """
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first = _token_with(encoding, start, end)
        if first is None:
            continue
        if ids[first] in swallowing and encoding.token_to_chars(first)[0] < start:
            first += 1
        last = encoding.char_to_token(end)
        if last is None:  # the text's end, or a character that no token has
            last = len(ids)
            while encoding.offsets[last - 1][0] >= end:
                last -= 1
        while last < len(ids) and encoding.token_to_chars(last)[0] < end:
            last += 1
        labels[first:last] = ids[first:last]
    return labels


def _token_with(encoding: Any, start: int, end: int) -> int | None:
    """The first token with a character of ``[start, end)``."""
    return next((found for i in range(start, end) if (found := encoding.char_to_token(i)) is not None), None)


def count_trained(labels: list[int]) -> int:
    """How many tokens of a row are trained; its first one never is, since nothing comes before it."""
    return sum(label != IGNORED for label in labels[1:])


def _no_markers(tokenizer: PreTrainedTokenizerBase) -> TokenizerError:
    return TokenizerError(
        "the chat template does not show where an assistant's turn starts",
        got=tokenizer.name_or_path,
        do="Pass instruction_part=... and response_part=... to train_on_responses_only.",
    )
