"""Requests and their sequences: what the scheduler and the engine know of them. No tensors but given embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch

from unsloth.generate.outputs import CompletionOutput
from unsloth.generate.sampling import SamplingParams
from unsloth.generate.text import TextStream

State = Literal["waiting", "prefill", "running", "finished"]


@dataclass(eq=False)
class Request:
    """A request.

    Attributes:
        id: Its name.
        prompt: Its text, if it was given as one.
        prompt_ids: Its tokens; placeholders for embeddings.
        embeddings: (T, K) in the place of tokens, or None.
        params: How to sample.
        lora: Name of its adapter, or None.
        stop_ids: Tokens that end a completion, the model's included.
        max_tokens: Longest completion.
        sequences: Its completions.
        cached: Prompt tokens that were in the cache already.
        error: What went wrong.
        changed: Whether there is something to report.
        pieces: Whether it is reported as it grows; else once, when it is finished.
    """

    id: str
    prompt: str | None
    prompt_ids: list[int]
    embeddings: torch.Tensor | None
    params: SamplingParams
    lora: str | None
    stop_ids: frozenset[int]
    max_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    cached: int = 0
    error: str | None = None
    changed: bool = False
    pieces: bool = True

    @property
    def finished(self) -> bool:
        """Whether all completions are."""
        return all(sequence.state == "finished" for sequence in self.sequences)

    def finished_but(self, last: Sequence) -> bool:
        """Whether all completions but ``last`` are."""
        return all(sequence is last or sequence.state == "finished" for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One completion of a request.

    Attributes:
        request: What it answers.
        seed: Of its random numbers.
        slot: Place of its adapter in the bank, or None.
        output: What is reported of it.
        text: Its text as it grows; None where none is asked for.
        state: ``"prefill"`` while tokens known in advance are computed, ``"running"`` afterwards.
        tokens: Of prompt and completion, as far as the host has seen them.
        length: Tokens in all, those that are still on the device included.
        computed: Tokens whose keys and values are in the cache.
        pages: Of the cache.
        known: How many of those are remembered by their tokens.
        row: Of the batch; None while it has none.
    """

    request: Request
    seed: int
    slot: int | None
    output: CompletionOutput
    text: TextStream | None
    state: State = "waiting"
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    known: int = 0
    row: int | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Tokens generated, those that are still on the device included."""
        return self.length - self.prompt_length

    @property
    def root(self) -> Hashable:
        """What its keys and values depend on besides tokens; embeddings are like no other."""
        return ("lora", self.request.lora) if self.request.embeddings is None else ("embeddings", self.request.id)

    def start(self) -> bytes:
        """Equal for sequences whose computation starts the same: a digest of root and tokens."""
        text = f"{self.root!r}:{','.join(map(str, self.tokens))}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
