"""Computes what the scheduler decides: known tokens of sequences, and one step of decoding for all rows.

A step of decoding is one function of static buffers: it reads the tokens that the step before drew, and leaves those
that it draws. On a GPU it is captured as a CUDA graph, by the number of rows rounded up and by what the rows need
(:class:`unsloth.generate.sampler.Kind`, adapters or not), on the second call with that key; the first runs as it is and
compiles what must be compiled. So are known tokens, where they are few enough that launching would take longer than
computing. Graphs live as long as everything that they read stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch

from unsloth.generate.adapter_bank import AdapterBank, Selection
from unsloth.generate.attention import on_device, span_attention, token_attention
from unsloth.generate.decoder import Decoder, Layer
from unsloth.generate.graphs import Graphs
from unsloth.generate.known_tokens import KnownTokens, KnownTokensBuffer
from unsloth.generate.kv_cache import KVCache
from unsloth.generate.live_model import LiveModel
from unsloth.generate.results import Drawn
from unsloth.generate.rows import RowTable
from unsloth.generate.sampler import Kind, Sampled, sample
from unsloth.generate.scheduler import Chunk, Plan
from unsloth.generate.sequence import Sequence
from unsloth.kernels.rope_to_pages import rope_to_pages

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128)


@dataclass
class Launch:
    """Tokens that were drawn for ``sequences``, on their way to the host.

    Attributes:
        sequences: Whose.
        sampled: On the host, once ``event`` has come.
        rows: Where in ``sampled`` those of each sequence are; None: in the order of the sequences.
        event: None where nothing is to be waited for.
    """

    sequences: list[Sequence]
    sampled: Sampled
    rows: torch.Tensor | None
    event: Any = None

    def wait(self) -> Drawn:
        """The tokens in the order of the sequences, once they are here."""
        if self.event is not None:
            self.event.synchronize()
        rows, found = self.rows, self.sampled
        if rows is not None:
            found = _map(found, lambda t: t[rows])
        return Drawn(
            found.tokens.tolist(),
            found.sampled.tolist(),
            found.model.tolist(),
            None if found.ranks is None else found.ranks.tolist(),
            None if found.top_values is None else found.top_values.tolist(),
            None if found.top_ids is None else found.top_ids.tolist(),
        )


class Runner:
    """The device's side of an engine.

    Args:
        live: The model.
        cache: Keys and values.
        rows: Rows of the batch.
        max_len: Longest sequence.
        graphs: Whether decoding steps are captured.
    """

    def __init__(self, live: LiveModel, cache: KVCache, rows: int, max_len: int, graphs: bool) -> None:
        self._live, self.cache, decoder = live, cache, live.decoder
        columns = -(-max_len // cache.shape.page_size)
        self.rows = RowTable(rows, columns, decoder.vocabulary, cache.shape.page_size, decoder.device)
        captures = graphs and decoder.device.type == "cuda" and not decoder.opaque
        self.graphs = Graphs(decoder.device) if captures else None
        self._known = KnownTokensBuffer(cache.shape.page_size, decoder.device, captures)
        self._fast = decoder.fast

    @property
    def decoder(self) -> Decoder:
        """The model's computation, which may have been read anew."""
        return self._live.decoder

    @property
    def bank(self) -> AdapterBank:
        """The adapters."""
        return self._live.bank

    def forget_graphs(self) -> None:
        """Something that graphs read has moved."""
        if self.graphs is not None:
            self.graphs.clear()

    @torch.no_grad()
    def launch(self, plan: Plan) -> list[Launch]:
        """Begin a step; nothing waits for the device."""
        device = self.decoder.device
        with torch.autocast(device.type, enabled=False):
            self.rows.move(plan.moves)
            launches = []
            if plan.decodes:
                launches.append(self._decode(plan.decodes))
            if plan.chunks:
                launches += self._prefill(plan.chunks)
            return launches

    def bucket(self, rows: int) -> int:
        """The number of rows that are computed for ``rows``."""
        most = self.rows.tokens.shape[0]
        found = next((size for size in _BUCKETS if size >= rows), -(-rows // 32) * 32)
        return min(found, most)

    def _decode(self, sequences: list[Sequence]) -> Launch:
        kind = kind_of(sequences)
        numbers = [sequence.computed - sequence.prompt_length for sequence in sequences]
        for sequence, number in zip(sequences, numbers, strict=True):
            if kind.bias and 0 < number == sequence.request.params.min_tokens:
                self.rows.set_bias(sequence, number)
        self.rows.draw_keys(sequences, numbers)
        self.rows.advance(sequences)
        self.rows.send()
        self.rows.send_pages(sequences)
        bucket = self.bucket(1 + max(sequence.row for sequence in sequences if sequence.row is not None))
        used, masked = self.bank.select([sequence.slot for sequence in sequences])
        key = (bucket, kind, used, masked)
        if self.graphs is None:
            sampled = self._step(*key)
        else:
            sampled = self.graphs.run(key, lambda: self._step(*key))
        rows = torch.tensor([sequence.row for sequence in sequences])
        return self._bring(sequences, sampled, rows)

    def _step(self, bucket: int, kind: Kind, used: bool, masked: bool) -> Sampled:
        """One token for each of the first ``bucket`` rows; the tokens stay in ``rows.tokens``."""
        rows, part = self.rows, slice(0, bucket)
        lengths = rows.row_values("length", part)
        tokens = rows.tokens[part]
        if kind.penalties and rows.counts is not None:
            rows.counts[part].scatter_add_(1, tokens[:, None], (lengths > 0).int()[:, None])
        positions, places = rows.row_values("position", part), rows.row_values("place", part)
        table = rows.table[part]

        def attend(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = self._enter(layer, q, k, v, positions, places)
            keys, values = self.cache.layer(layer.index)
            return token_attention(
                q, keys, values, table, lengths, scale=layer.scale, window=layer.window, softcap=layer.softcap,
                fast=self._fast,
            )  # fmt: skip

        adapters = self._selection(rows.row_values("slot", part), used, masked)
        hidden = self.decoder.hidden(self.decoder.embed(tokens), attend, adapters)
        sampled = sample(self.decoder.logits(hidden, adapters), rows.controls(part, kind), kind, self._fast)
        tokens.copy_(torch.where(lengths > 0, sampled.tokens, tokens))
        return sampled

    def _enter(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Give q and k their positions, and put k and v at their places in the cache; returns q."""
        tables = self.decoder.plain_tables(layer)
        if tables is not None and self._fast and q.is_cuda:
            rope_to_pages(q, k, v, *tables, positions, places, *self.cache.layer(layer.index))
            return q
        q, k = self.decoder.position(layer, q, k, positions)
        self.cache.write(layer.index, places.long(), k, v)
        return q

    def _prefill(self, chunks: list[Chunk]) -> list[Launch]:
        self.rows.send_pages([chunk.sequence for chunk in chunks])
        batch = self._known.send(chunks, self.rows.table)
        used, masked = self.bank.select([chunk.sequence.slot for chunk in chunks])
        if batch.padded is None or self.graphs is None:
            hidden = self._compute(batch, chunks, used, masked)
        else:
            key = ("known", batch.padded, used, masked)
            hidden = self.graphs.run(key, lambda: self._compute(batch, (), used, masked))
        forks = [fork for chunk in chunks for fork in chunk.forks]
        copies = [(fork.source, fork.target) for fork in forks if fork.source is not None and fork.target is not None]
        self.cache.copy_pages([source for source, _ in copies], [target for _, target in copies])
        return self._first_tokens(chunks, batch.ends, hidden)

    def _compute(self, batch: KnownTokens, chunks: Many[Chunk], used: bool, masked: bool) -> torch.Tensor:
        """(T, K), hidden states of known tokens; ``chunks`` to take given embeddings from."""

        def attend(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q = self._enter(layer, q, k, v, batch.positions, batch.places)
            return span_attention(
                q, *self.cache.layer(layer.index), batch.spans, scale=layer.scale, window=layer.window,
                softcap=layer.softcap, fast=self._fast,
            )  # fmt: skip

        adapters = self._selection(batch.slots if masked else None, used, masked)
        x = self.decoder.embed(batch.ids)
        for chunk, span in zip(chunks, batch.spans.spans if chunks else (), strict=True):
            given = chunk.sequence.request.embeddings
            if given is not None and chunk.start < given.shape[0]:
                part = given[chunk.start : min(chunk.stop, given.shape[0])]
                x[span.first : span.first + part.shape[0]] = part.to(x.device, x.dtype)
        return self.decoder.hidden(x, attend, adapters)

    def _first_tokens(self, chunks: list[Chunk], ends: list[int], hidden: torch.Tensor) -> list[Launch]:
        """Draw the first token of the sequences whose known tokens are all computed now."""
        sequences: list[Sequence] = []
        last: list[int] = []
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.last:
                new = [chunk.sequence, *(fork.sequence for fork in chunk.forks)]
                sequences += new
                last += [end] * len(new)
        if not sequences:
            return []
        kind = kind_of(sequences)
        self.rows.reserve(kind)
        for sequence in sequences:
            self.rows.start(sequence)
        self.rows.draw_keys(sequences, [len(s.tokens) - s.prompt_length for s in sequences])
        self.rows.send()
        device = self.decoder.device
        at = on_device(torch.tensor([last, [sequence.row for sequence in sequences]]), device)
        slots = [sequence.slot for sequence in sequences]
        used, masked = self.bank.select(slots)
        adapters = self._selection(_spread(slots, [1] * len(slots), device) if masked else None, used, masked)
        distinct, back = torch.unique(torch.tensor(last), return_inverse=True)
        if len(distinct) < len(last) and not masked:  # forks share logits
            logits = self.decoder.logits(hidden[on_device(distinct, device)], adapters)[on_device(back, device)]
        else:
            logits = self.decoder.logits(hidden[at[0]], adapters)
        sampled = sample(logits, self.rows.controls(at[1], kind), kind, self._fast)
        self.rows.tokens[at[1]] = sampled.tokens
        return [self._bring(sequences, sampled, None)]

    def _selection(self, slots: torch.Tensor | None, used: bool, masked: bool) -> Selection:
        if not masked or slots is None:
            return Selection(used)
        names = torch.arange(len(self.bank.slots), device=slots.device)
        return Selection(used, (slots[:, None] == names).to(self.decoder.dtype))

    def _bring(self, sequences: Many[Sequence], sampled: Sampled, rows: torch.Tensor | None) -> Launch:
        """Start copying results to the host."""
        if self.decoder.device.type != "cuda":
            return Launch(list(sequences), sampled, rows)
        host = _map(sampled, lambda t: t.to("cpu", non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return Launch(list(sequences), host, rows, event)


def kind_of(sequences: Iterable[Sequence]) -> Kind:
    """What sampling for these sequences needs."""
    params = [sequence.request.params for sequence in sequences]
    return Kind(
        cuts=any(not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
        penalties=any(p.penalized for p in params),
        bias=any(bool(p.logit_bias) or p.min_tokens > 0 for p in params),
        logprobs=max((-1 if p.logprobs is None else p.logprobs for p in params), default=-1),
    )


def _map(sampled: Sampled, function: Callable[[torch.Tensor], torch.Tensor]) -> Sampled:
    fields = (sampled.tokens, sampled.sampled, sampled.model, sampled.ranks, sampled.top_values, sampled.top_ids)
    return Sampled(*(None if value is None else function(value) for value in fields))  # type: ignore[arg-type]


def _spread(slots: Many[int | None], counts: Many[int], device: torch.device) -> torch.Tensor:
    """(T,) int64, the slot of every token; -1 for none."""
    values = torch.tensor([-1 if slot is None else slot for slot in slots])
    return on_device(values.repeat_interleave(torch.tensor(counts)), device)
