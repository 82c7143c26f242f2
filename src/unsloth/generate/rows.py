"""What the device knows of the rows of a batch, and how it gets there.

A row is a sequence's place in the batch for as long as it runs. Position, length and random key of every row change
with each token and are sent in one copy; the next token itself is on the device already, since the step before drew
it. Addresses of pages are sent when they are added.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from unsloth.generate.attention import on_device
from unsloth.generate.sampler import Controls, Kind, keys_of
from unsloth.generate.sequence import Sequence

_INTS = ("position", "length", "place", "slot", "top_k", "key1", "key2")
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_ALL = 2**64 - 1
_AT = {name: i for i, name in enumerate((*_INTS, *_FLOATS))}


class RowTable:
    """State of the rows.

    Args:
        rows: How many.
        columns: Pages that a sequence may have.
        vocabulary: Tokens that there are.
        page_size: Tokens of a page.
        device: Where the batch is computed.

    Attributes:
        tokens: (rows,) int64, the token that each row consumes next.
        table: (rows, columns) int32, its pages.
        values: (13, rows) int32, see ``_INTS``; floats by their bits.
    """

    def __init__(self, rows: int, columns: int, vocabulary: int, page_size: int, device: torch.device) -> None:
        self.page_size, self.vocabulary, self.device = page_size, vocabulary, device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.table = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self.values = torch.zeros(len(_AT), rows, dtype=torch.int32, device=device)
        self.counts: torch.Tensor | None = None
        self.prompt: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._host = np.zeros((len(_AT), rows), dtype=np.int32)
        self._sent: list[tuple[list[int], int]] = [([], 0)] * rows  # pages of each row, how many the device knows

    def controls(self, rows: slice | torch.Tensor, kind: Kind) -> Controls:
        """The sampler's view of some rows."""
        values = self.values[:, rows]
        floats = {name: values[_AT[name]].view(torch.float32) for name in _FLOATS}
        counts = self.counts[rows] if kind.penalties and self.counts is not None else None
        prompt = self.prompt[rows] if kind.penalties and self.prompt is not None else None
        bias = self.bias[rows] if kind.bias and self.bias is not None else None
        keys = values[_AT["key1"] : _AT["key2"] + 1]
        return Controls(**floats, top_k=values[_AT["top_k"]], keys=keys, counts=counts, prompt=prompt, bias=bias)

    def row_values(self, name: str, rows: slice) -> torch.Tensor:
        """(rows,) int32 of one kind."""
        return self.values[_AT[name], rows]

    def start(self, sequence: Sequence) -> None:
        """Fill the row of a sequence whose first token (after its known ones) is about to be drawn."""
        row, params = sequence.row, sequence.request.params
        assert row is not None
        ints = {
            "slot": -1 if sequence.slot is None else sequence.slot,
            "top_k": min(max(params.top_k, 0), self.vocabulary),
        }
        floats = {
            "temperature": 0.0 if params.greedy else params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        for name, value in ints.items():
            self._host[_AT[name], row] = value
        for name, number in floats.items():
            self._host[_AT[name], row] = np.float32(number).view(np.int32)
        if params.penalized:
            self._count(sequence, row)
        if self.bias is not None:  # the row's former sequence may have had one
            self.set_bias(sequence, len(sequence.tokens) - sequence.prompt_length)

    def draw_keys(self, sequences: Rows[Sequence], numbers: Rows[int]) -> None:
        """Set the random keys for the token of each sequence that is drawn next."""
        rows = np.array([sequence.row for sequence in sequences])
        seeds = np.array([sequence.seed & _ALL for sequence in sequences], dtype=np.uint64)
        self._host[_AT["key1"] : _AT["key2"] + 1, rows] = keys_of(seeds, np.array(numbers, dtype=np.uint64))

    def advance(self, sequences: Rows[Sequence]) -> None:
        """Set position, length and place in the cache of the token that each sequence consumes; others are idle."""
        size, host = self.page_size, self._host
        host[: _AT["place"] + 1] = 0
        rows = np.array([sequence.row for sequence in sequences])
        position = np.array([sequence.computed - 1 for sequence in sequences])
        pages = np.array([sequence.pages[(sequence.computed - 1) // size] for sequence in sequences])
        host[_AT["position"], rows] = position
        host[_AT["length"], rows] = position + 1
        host[_AT["place"], rows] = pages * size + position % size

    def send(self) -> None:
        """Copy what was set to the device."""
        self.values.copy_(on_device(torch.from_numpy(self._host), self.device))

    def send_pages(self, sequences: Rows[Sequence]) -> None:
        """Copy the addresses of pages that the device does not know."""
        entries: list[tuple[int, int, int]] = []
        for sequence in sequences:
            assert sequence.row is not None
            of, known = self._sent[sequence.row]
            known = known if of is sequence.pages else 0  # else those of the row's former sequence
            if known == len(sequence.pages):
                continue
            entries += [(sequence.row, i, sequence.pages[i]) for i in range(known, len(sequence.pages))]
            self._sent[sequence.row] = sequence.pages, len(sequence.pages)
        if entries:
            rows, columns, pages = on_device(torch.tensor(entries, dtype=torch.int64).T.contiguous(), self.device)
            self.table[rows, columns] = pages.to(torch.int32)

    def move(self, moves: Rows[tuple[int, int]]) -> None:
        """Let rows go elsewhere, one after the other."""
        for source, target in moves:
            self._host[:, target] = self._host[:, source]
            self._sent[target] = [], 0
            for tensor in (self.tokens, self.counts, self.prompt, self.bias):
                if tensor is not None:
                    tensor[target] = tensor[source]

    def reserve(self, kind: Kind) -> None:
        """Allocate what this kind of sampling needs."""
        shape = (self.tokens.shape[0], self.vocabulary)
        if kind.penalties and self.counts is None:
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if kind.bias and self.bias is None:
            self.bias = torch.zeros(shape, dtype=torch.float32, device=self.device)

    def set_bias(self, sequence: Sequence, generated: int) -> None:
        """Fill a row of biases: the request's, and minus infinity for its ends while it is too short for them."""
        assert self.bias is not None and sequence.row is not None
        row, params = self.bias[sequence.row], sequence.request.params
        row.zero_()
        if params.logit_bias:
            ids = on_device(torch.tensor(list(params.logit_bias)), self.device)
            values = on_device(torch.tensor(list(params.logit_bias.values()), dtype=torch.float32), self.device)
            row.index_copy_(0, ids, values)
        ends = [i for i in sorted(sequence.request.stop_ids) if i < self.vocabulary]
        if generated < params.min_tokens and ends:
            ids = on_device(torch.tensor(ends), self.device)
            row.index_fill_(0, ids, float("-inf"))

    def _count(self, sequence: Sequence, row: int) -> None:
        assert self.counts is not None and self.prompt is not None
        self.counts[row], self.prompt[row] = 0, False
        if sequence.request.embeddings is None:
            given = torch.tensor(sequence.tokens[: sequence.prompt_length])
            self.prompt[row].index_fill_(0, on_device(given, self.device), True)
        generated = on_device(torch.tensor(sequence.tokens[sequence.prompt_length :], dtype=torch.int64), self.device)
        self.counts[row].scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
