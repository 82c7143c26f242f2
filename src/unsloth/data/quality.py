"""Looking at a data set as a whole: lengths, duplicates, splits, and rows that are in both halves of one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError, DataError
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import Rows, measure, prepare


@dataclass(frozen=True)
class Statistics:
    """What a data set amounts to.

    Attributes:
        rows: Rows.
        tokens: Tokens of all rows, nothing cut off.
        trained_tokens: Those of them that are trained.
        shortest: Tokens of the shortest row.
        median: Tokens of the row in the middle.
        longest: Tokens of the longest row.
        longer: Rows longer than the maximum length that was asked for; 0 if none was.
        duplicates: Rows that repeat an earlier one.
        suggested_max_length: The smallest multiple of 64 that holds 99% of the rows.
    """

    rows: int
    tokens: int
    trained_tokens: int
    shortest: int
    median: int
    longest: int
    longer: int
    duplicates: int
    suggested_max_length: int


def statistics(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, options: PrepareOptions
) -> Statistics:
    """Count rows, tokens, lengths and duplicates.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        options: How rows become tokens; nothing is cut off or packed here.

    Raises:
        DataError: No rows, or one that cannot be used; names it.
    """
    limit = options.max_length
    encoded, report = prepare(rows, tokenizer, replace(options, max_length=None, packing=False, pack_length=None))
    assert report is not None and isinstance(encoded, Dataset)
    lengths, _ = measure(encoded)
    enough = int(np.quantile(lengths, 0.99, method="higher"))
    return Statistics(
        rows=report.rows,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        longer=int((lengths > limit).sum()) if limit is not None else 0,
        duplicates=len(rows) - len(unique(rows)),
        suggested_max_length=-(-enough // 64) * 64,
    )


def unique(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows that repeat no earlier one; case and white space make no difference."""
    seen: set[bytes] = set()
    kept = []
    for number, key in enumerate(_keys(rows)):
        if key not in seen:
            seen.add(key)
            kept.append(number)
    return kept


def leaks(train: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows of ``heldout`` that are in ``train`` too; compared as in :func:`unique`."""
    seen = set(_keys(train))
    return [number for number, key in enumerate(_keys(heldout)) if key in seen]


def split(rows: Rows, heldout: float = 0.1, random_state: int = 3407) -> tuple[Any, Any]:
    """Shuffle and split, equal rows staying on one side.

    Args:
        rows: A data set or a list.
        heldout: The share of the second part.
        random_state: Seed of the order.

    Returns:
        The two parts, of the type that ``rows`` has (lists for other sequences).

    Raises:
        ConfigError: A share that is not between 0 and 1.
        DataError: Too few different rows.
    """
    if not 0 < heldout < 1:
        raise ConfigError("heldout must be a share between 0 and 1", got=heldout)
    groups: dict[bytes, list[int]] = {}
    for number, key in enumerate(_keys(rows)):  # type: ignore[arg-type]
        groups.setdefault(key, []).append(number)
    if len(groups) < 2:
        raise DataError("there are fewer than two different rows to split", got=len(groups))
    keys = list(groups)
    draw = random.Random(random_state)
    draw.shuffle(keys)
    wanted = min(max(round(len(keys) * heldout), 1), len(keys) - 1)
    parts = []
    for chosen in (keys[wanted:], keys[:wanted]):
        numbers = [number for key in chosen for number in groups[key]]
        draw.shuffle(numbers)
        parts.append(rows.select(numbers) if isinstance(rows, Dataset) else [rows[n] for n in numbers])  # type: ignore[index]
    return parts[0], parts[1]


def _keys(rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        text = json.dumps(row, sort_keys=True, default=str, ensure_ascii=False)
        yield hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "replace"), digest_size=16).digest()
