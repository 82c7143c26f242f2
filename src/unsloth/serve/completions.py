"""Answers to ``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from unsloth.generate.outputs import CompletionOutput, RequestOutput
from unsloth.serve import answers
from unsloth.serve.requests import CompletionRequest
from unsloth.serve.service import Service


@dataclass
class TextAnswer:
    """One request on its way.

    Attributes:
        service: Computes it.
        request: The body of the request; its n completions of every prompt are numbered through.
    """

    service: Service
    request: CompletionRequest
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs of the engine.

        Raises:
            ConfigError: The sampling parameters make no sense.
            HTTPException: There is no such model.
        """
        request = self.request
        params = request.sampling(self.service.sampling_defaults, request.max_tokens, request.logprobs)
        return self.service.outputs(request.prompts(), params, self.service.lora(request.model))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        last = await self._last()
        choices = [
            self._choice(position, output, output.text, 0)
            for position in sorted(last)
            for output in last[position].outputs
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(last)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        sent: dict[int, int] = {}
        last: dict[int, RequestOutput] = {}
        async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
            async for position, output in outputs:
                last[position] = output
                choices = [
                    self._choice(position, item, item.new_text, len(item.token_ids) - len(item.new_token_ids))
                    for item in output.outputs
                    if self._is_new(position, item, sent)
                ]
                if choices:
                    yield answers.event({**self._head(), "choices": choices})
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield answers.event({**self._head(), "choices": [], "usage": self._usage(last)})
        yield answers.DONE

    def _is_new(self, position: int, item: CompletionOutput, sent: dict[int, int]) -> bool:
        """Whether ``item`` says anything that was not sent, its end included."""
        index = self._index(position, item)
        known = sent.get(index, 0)
        if known < 0:
            return False
        sent[index] = -1 if item.finished() else len(item.token_ids)
        return item.finished() or bool(item.new_text) or (item.logprobs is not None and len(item.token_ids) > known)

    async def _last(self) -> dict[int, RequestOutput]:
        last: dict[int, RequestOutput] = {}
        async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
            async for position, output in outputs:
                last[position] = output
        return last

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.request.model}

    def _usage(self, last: dict[int, RequestOutput]) -> dict[str, Any]:
        outputs = last.values()
        generated = sum(len(item.token_ids) for output in outputs for item in output.outputs)
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        return answers.usage(prompt, generated, sum(output.num_cached_tokens for output in outputs))

    def _index(self, position: int, item: CompletionOutput) -> int:
        return position * self.request.n + item.index

    def _choice(self, position: int, item: CompletionOutput, text: str, first_token: int) -> dict[str, Any]:
        return {
            "index": self._index(position, item),
            "text": text,
            "logprobs": _logprobs(item, first_token, self.request.logprobs or 0),
            "finish_reason": item.finish_reason,
        }


def _logprobs(item: CompletionOutput, start: int, count: int) -> dict[str, Any] | None:
    if item.logprobs is None:
        return None
    tokens, own, top, offsets = [], [], [], []
    offset = 0
    for position, (token, likely) in enumerate(zip(item.token_ids, item.logprobs, strict=True)):
        text = likely[token].decoded_token or ""
        if position >= start:
            tokens.append(text)
            own.append(likely[token].logprob)
            least_first = sorted(likely.values(), key=lambda entry: -entry.rank)  # of equal texts the likeliest stays
            top.append({e.decoded_token or "": e.logprob for e in least_first if e.rank <= count})
            offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}
