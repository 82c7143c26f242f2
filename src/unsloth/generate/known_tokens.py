"""Known tokens of several sequences as one flat batch, and how it gets to the device.

All that the device must know of a batch is sent in one copy. A batch that is padded to a size of :data:`SIZES` stands
in the same buffer every time, so that a captured graph finds the next one there. Padding writes to page 0, which is
nobody's, and no tile of attention holds it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from unsloth.generate.attention import Span, SpanBatch, on_device
from unsloth.generate.scheduler import Chunk
from unsloth.kernels.paged_prefill import TILE, make_tiles

SIZES = (16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)


@dataclass(frozen=True)
class KnownTokens:
    """A batch on the device; T tokens, padding included.

    Attributes:
        ids: (T,) int32; 0 where an embedding was given.
        positions: (T,) int32, in their sequences.
        places: (T,) int32, in the cache: page times its size, and the place in the page.
        slots: (T,) int32, of their adapters; -1 for none.
        spans: Which tokens are whose.
        ends: For each chunk, the place of its last token in the batch.
        padded: T if it is one of :data:`SIZES` and the batch stands in the buffer, else None.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    spans: SpanBatch
    ends: list[int]
    padded: int | None


class KnownTokensBuffer:
    """Where padded batches stand.

    Args:
        page_size: Tokens of a page.
        device: Where the model is.
        pads: Whether batches are padded.
    """

    def __init__(self, page_size: int, device: torch.device, pads: bool) -> None:
        self._page_size, self._device = page_size, device
        most = 4 * (SIZES[-1] + _tiles_of(SIZES[-1]))
        self._buffer = torch.zeros(most, dtype=torch.int32, device=device) if pads else None

    def send(self, chunks: Many[Chunk], table: torch.Tensor) -> KnownTokens:
        """Copy a batch to the device.

        Args:
            chunks: Its tokens; of sequences that have rows.
            table: (rows, columns) int32, the pages of each row, those of these sequences among them.
        """
        size, first, ends = self._page_size, 0, []
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        spans: list[Span] = []
        for chunk in chunks:
            count, pages = chunk.stop - chunk.start, chunk.sequence.pages[: -(-chunk.stop // size)]
            spans.append(Span(first, count, chunk.start, pages))
            first += count
            ends.append(first - 1)
        tiles = make_tiles([(span.count, span.start) for span in spans]).numpy()
        tiles[:, 3] = np.array([chunk.sequence.row for chunk in chunks])[tiles[:, 3]]
        padded = self._padded_size(chunks, total, len(tiles))
        width, height = (total, len(tiles)) if padded is None else (padded, _tiles_of(padded))
        host = np.zeros(4 * (width + height), dtype=np.int32)
        ids, positions, places, slots = host[: 4 * width].reshape(4, width)
        slots[:] = -1
        for chunk, span in zip(chunks, spans, strict=True):
            part, sequence = slice(span.first, span.first + span.count), chunk.sequence
            ids[part] = sequence.tokens[chunk.start : chunk.stop]
            positions[part] = position = np.arange(chunk.start, chunk.stop)
            places[part] = np.array(span.pages)[position // size] * size + position % size
            slots[part] = -1 if sequence.slot is None else sequence.slot
        np.maximum(ids, 0, out=ids)
        host[4 * width : 4 * (width + len(tiles))] = tiles.reshape(-1)
        sent = on_device(torch.from_numpy(host), self._device)
        if padded is not None and self._buffer is not None:
            sent = self._buffer[: len(host)].copy_(sent)
        ids_T, positions_T, places_T, slots_T = sent[: 4 * width].view(4, width)
        batch = SpanBatch(spans, table, sent[4 * width :].view(height, 4))
        return KnownTokens(ids_T, positions_T, places_T, slots_T, batch, ends, padded)

    def _padded_size(self, chunks: Many[Chunk], total: int, tiles: int) -> int | None:
        if self._buffer is None or any(chunk.sequence.request.embeddings is not None for chunk in chunks):
            return None
        return next((size for size in SIZES if size >= total and _tiles_of(size) >= tiles), None)


def _tiles_of(size: int) -> int:
    """Tiles that a padded batch has room for: those of one sequence, and one more for every eight tokens."""
    return size // TILE + size // 8
