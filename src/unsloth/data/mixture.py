"""Several data sets in one, by weight."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from unsloth.core.errors import ConfigError, DataError
from unsloth.data import formats
from unsloth.data.formats import Detection
from unsloth.data.json_rows import LazyRows


class Mixture(LazyRows):
    """Rows of several data sets in random order, with given shares; see :func:`mix`."""

    def __init__(self, parts: Sequence[Any], order: Sequence[tuple[int, int]], readers: Sequence[Detection]) -> None:
        self._parts = parts
        self._order = order
        self._readers = readers

    def __len__(self) -> int:
        return len(self._order)

    def row(self, number: int) -> Mapping[str, Any]:
        """Row ``number``, as a conversation or a text."""
        part, place = self._order[number]
        row, detection = self._parts[part][place], self._readers[part]
        if detection.layout in ("text", "tokens"):
            return row
        found = formats.conversation_of(row, place, detection)
        extra = {"tools": found.tools} if found.tools else {}
        return {"messages": found.messages, **extra, **(found.variables or {})}

    def counts(self) -> list[int]:
        """How many rows each data set gives."""
        return [sum(part == i for part, _ in self._order) for i in range(len(self._parts))]


def mix(
    parts: Sequence[Any],
    weights: Sequence[float],
    *,
    rows: int | None = None,
    text_field: str = "text",
    random_state: int = 3407,
) -> Mixture:
    """Mix data sets of conversations, or of texts, by weight.

    No row is used twice: the data set that is smallest for its weight is used whole, and of the others as many rows as
    their weights allow, chosen at random.

    Args:
        parts: Data sets, or lists of mappings; each in a layout of its own.
        weights: The share of each, such as ``[0.75, 0.25]``; they need not add up to 1.
        rows: How many rows in all; None is as many as there can be.
        text_field: The column that holds text, for data sets of texts.
        random_state: Seed of choice and order.

    Raises:
        ConfigError: Weights that make no sense, or more rows than there are.
        DataError: A data set without rows, or texts mixed with conversations.
    """
    if len(parts) != len(weights) or not parts or any(weight <= 0 for weight in weights):
        raise ConfigError("mix needs a positive weight for each data set", got=list(weights))
    for i, part in enumerate(parts):
        if not len(part):
            raise DataError(f"data set {i} of the mixture has no rows")
    readers = [formats.detect(list(part[0]), text_field) for part in parts]
    kinds = {"text" if reader.layout in ("text", "tokens") else "conversation" for reader in readers}
    for reader, part in zip(readers, parts, strict=True):
        if reader.layout not in ("text", "tokens", "conversation", "alpaca"):
            formats.refuse_for_sft(reader, list(part[0]))
            raise DataError("this layout cannot be mixed", got=reader.layout, do="Use standardize_sharegpt first.")
    if len(kinds) > 1:
        raise DataError(
            "texts cannot be mixed with conversations",
            got=[reader.layout for reader in readers],
            do="Render the conversations first: apply_chat_template(dataset, tokenizer).",
        )
    shares = [weight / sum(weights) for weight in weights]
    most = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    if rows is not None and rows > most:
        raise ConfigError(f"with these weights there are at most {int(most)} rows", got=rows)
    draw = random.Random(random_state)
    order = []
    for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = min(round((most if rows is None else rows) * share), len(part))
        order += [(i, place) for place in draw.sample(range(len(part)), count)]
    draw.shuffle(order)
    return Mixture(parts, order, readers)
