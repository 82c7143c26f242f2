"""Whole generations and streams, for any engine that makes progress by steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from unsloth.core.errors import ConfigError, GenerationError
from unsloth.generate import prompts
from unsloth.generate.outputs import RequestOutput
from unsloth.generate.protocol import Lora, Prompt


class SteppedEngine(ABC):
    """What the engines here share; see :class:`unsloth.generate.protocol.Engine`."""

    @abstractmethod
    def add_request(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> str:
        """See :meth:`unsloth.generate.protocol.Engine.add_request`."""

    @abstractmethod
    def step(self) -> list[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.Engine.step`."""

    @abstractmethod
    def _drop(self, names: Sequence[str]) -> None:
        """Abort requests whose results nobody wants."""

    def _add_each(self, requests: Iterable[tuple[Prompt, Any, Any]], names: list[str]) -> None:
        """Add requests (prompt, parameters, adapter) whose pieces nobody reads; their names as they are added."""
        for prompt, params, lora in requests:
            names.append(self.add_request(prompt, params, lora=lora))

    def generate(
        self, prompts_given: Any, params: Any = None, *, lora: Any = None, progress: Any = None
    ) -> list[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.Engine.generate`.

        Args:
            prompts_given: One prompt or several.
            params: For all, or a list.
            lora: For all, or a list.
            progress: Called after every step with the number of requests that have ended in it; what it raises ends
                the generation.

        Raises:
            GenerationError: The device failed.
        """
        many = [prompts_given] if prompts.is_single(prompts_given) else list(prompts_given)
        each = list(params) if isinstance(params, list | tuple) else [params] * len(many)
        loras = list(lora) if isinstance(lora, list | tuple) else [lora] * len(many)
        if len(each) != len(many) or len(loras) != len(many):
            got = f"{len(many)} prompts, {len(each)} parameters, {len(loras)} adapters"
            raise ConfigError("parameters and adapters must be one for all prompts, or one for each", got=got)
        names: list[str] = []
        found: dict[str, RequestOutput] = {}
        try:
            self._add_each(zip(many, each, loras, strict=True), names)
            wanted = set(names)
            while len(found) < len(names):
                done = {out.request_id: out for out in self.step() if out.finished and out.request_id in wanted}
                found |= done
                if progress is not None:
                    progress(len(done))
        finally:
            self._drop(names)
        broken = next((out.error for out in found.values() if out.error), None)
        if broken is not None:
            raise GenerationError(
                f"generation failed: {broken}",
                do="If memory ran out, lower gpu_memory_utilization, or max_num_seqs in EngineOptions.",
            )
        return [found[name] for name in names]

    def stream(self, prompt: Prompt, params: Any = None, *, lora: Lora = None) -> Iterator[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.Engine.stream`."""
        name = self.add_request(prompt, params, lora=lora)
        try:
            finished = False
            while not finished:
                for output in self.step():
                    if output.request_id == name:
                        finished = output.finished
                        yield output
        finally:
            self._drop([name])
