"""What an engine offers, whichever it is: the one of this package, or vLLM behind the same methods.

An :class:`Engine` belongs to one thread: whoever calls ``step`` makes progress, nobody else does. An
:class:`AsyncEngine` has a thread of its own for that, and is used from an event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch

from unsloth.generate.outputs import RequestOutput
from unsloth.generate.sampling import SamplingParams

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message] | torch.Tensor | Mapping[str, Any]
"""A text; token ids; a chat; embeddings (T, hidden size); or vLLM's mapping with ``prompt`` or ``prompt_token_ids``."""


@dataclass(frozen=True)
class LoRARequest:
    """An adapter that the engine has, under a name; vLLM's class of this name is accepted in its place.

    Attributes:
        lora_name: Its name.
        lora_int_id: A number; not used.
        lora_path: The folder that it is loaded from if the engine does not have it yet.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""


Lora: TypeAlias = str | LoRARequest | Literal[False] | None
"""A name or a request; False for the base model without any adapter; None for the model as it stands."""


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine: of this moment, and since it was made.

    Attributes:
        waiting: Requests that have not started.
        running: Sequences that are being computed.
        pages: Pages of the cache; 0 while its memory is given back.
        free_pages: Pages that hold nothing a running sequence needs.
        requests: Requests that were taken.
        finished: Requests that were answered in full.
        aborted: Requests that were ended from outside or by an error.
        prompt_tokens: Prompt tokens computed.
        cached_tokens: Prompt tokens found in the cache instead.
        generated_tokens: Tokens sampled.
        preemptions: Times a sequence gave up its pages, to be computed again.
        graphs: CUDA graphs that are held.
        cache_bytes: Memory of the cache.
        graph_seconds: Time spent capturing graphs.
    """

    waiting: int
    running: int
    pages: int
    free_pages: int
    requests: int
    finished: int
    aborted: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    graphs: int
    cache_bytes: int
    graph_seconds: float = 0.0


class Engine(Protocol):
    """Generation driven by its caller; not safe to use from several threads at once."""

    tokenizer: Any
    max_model_len: int

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | Any = None,
        *,
        request_id: str | None = None,
        lora: Lora = None,
    ) -> str:
        """Queue a request and return its id; everything that can be wrong with it is an error here, not later.

        Raises:
            ConfigError: The prompt is empty or too long, the parameters make no sense, or the id is in use.
            AdapterError: There is no such adapter, or it does not fit.
        """

    def step(self) -> list[RequestOutput]:
        """Compute once for all that fits, and return every request that gained something or ended."""

    def has_unfinished(self) -> bool:
        """Whether ``step`` has something to do."""

    def abort(self, request_id: str) -> bool:
        """End a request; False if it is not there (any more). Its last output comes out of the next ``step``."""

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Any = None, *, lora: Lora | Sequence[Lora] = None
    ) -> list[RequestOutput]:
        """Answer prompts, in their order; ``params`` is one for all or a list."""

    def stream(self, prompt: Prompt, params: Any = None, *, lora: Lora = None) -> Iterator[RequestOutput]:
        """Answer one prompt piece by piece; leaving the loop aborts it."""

    def load_adapter(self, name: str, path: str) -> LoRARequest:
        """Load a saved adapter under a name; with a name in use, in its place once nothing runs on that.

        Raises:
            AdapterError: It does not fit the model, or is of a kind that cannot be applied without merging.
        """

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; AdapterError if there is none of that name, or requests still use it."""

    def adapters(self) -> list[str]:
        """Names of the adapters, those of the model included."""

    def stats(self) -> EngineStats:
        """Counts."""

    def sleep(self) -> None:
        """Give the cache's memory back; it is taken again when needed. Requests go on after that."""

    def shutdown(self) -> None:
        """Abort everything and free all memory; every later call but this one is an error."""


class AsyncEngine(Protocol):
    """Generation in a thread of its own, for an event loop; safe to use from many tasks and threads."""

    tokenizer: Any
    max_model_len: int

    def generate(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they come, the last with ``finished``; closing or cancelling the iterator aborts the request.

        A slow reader gets several steps' gains in one output. Errors are those of :meth:`Engine.add_request`, raised
        at the first ``anext``.
        """

    async def answer(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> RequestOutput:
        """Only the last output."""

    async def abort(self, request_id: str) -> bool:
        """As :meth:`Engine.abort`."""

    async def load_adapter(self, name: str, path: str) -> LoRARequest:
        """As :meth:`Engine.load_adapter`."""

    async def unload_adapter(self, name: str) -> None:
        """As :meth:`Engine.unload_adapter`."""

    def adapters(self) -> list[str]:
        """As :meth:`Engine.adapters`."""

    def stats(self) -> EngineStats:
        """As :meth:`Engine.stats`."""

    async def shutdown(self, drain: float = 0.0) -> None:
        """Take no more requests, give those in flight ``drain`` seconds to finish, and abort the rest."""
