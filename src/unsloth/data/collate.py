"""From prepared rows to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from unsloth.data.masking import IGNORED

# Legend: B rows, T tokens of the longest row, N tokens of all rows together.


@dataclass(frozen=True)
class Collator:
    """Builds a batch of int64 tensors.

    Rows as they are become ``input_ids``, ``attention_mask`` and ``labels`` of shape [B, T], padded on the right.
    Rows with ``seq_lengths`` (packed or padding-free) become ``input_ids``, ``labels`` and ``position_ids`` of
    shape [1, N]: positions start anew at each document, by which attention keeps documents apart.

    Attributes:
        pad_token_id: Fills ``input_ids`` where the attention mask is 0; any token does, so None is 0.
        pad_to_multiple_of: Round T up to a multiple of this.
    """

    pad_token_id: int | None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate ``rows``, each with ``input_ids`` and ``labels``."""
        if "seq_lengths" in rows[0]:
            return self._flatten(rows)
        return self._pad(rows)

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        width = -(-longest // multiple) * multiple
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id or 0),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORED),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        return batch

    def _flatten(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [length for row in rows for length in row["seq_lengths"]]
        labels = torch.tensor([list(chain.from_iterable(row["labels"] for row in rows))])
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        labels[0, starts] = IGNORED  # a document's first token must not be predicted from the one before it
        return {
            "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in rows))]),
            "labels": labels,
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
