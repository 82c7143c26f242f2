"""Answers to ``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from unsloth.data import tool_calls
from unsloth.generate.outputs import CompletionOutput, RequestOutput
from unsloth.serve import answers
from unsloth.serve.requests import ChatRequest
from unsloth.serve.service import Service


@dataclass
class ChatAnswer:
    """One request on its way.

    Attributes:
        service: Computes it.
        request: The body of the request.
        prompt: Its messages as token ids.
    """

    service: Service
    request: ChatRequest
    prompt: list[int]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs of the engine.

        Raises:
            ConfigError: The sampling parameters make no sense.
            HTTPException: There is no such model.
        """
        request = self.request
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = request.sampling(self.service.sampling_defaults, request.limit, logprobs)
        return self.service.outputs([self.prompt], params, self.service.lora(request.model))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        last: RequestOutput | None = None
        async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
            async for _, output in outputs:
                last = output
        assert last is not None
        choices = [self._choice(output) for output in last.outputs]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage(last)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        streams = [_Stream(index, self.request) for index in range(self.request.n)]
        last: RequestOutput | None = None
        async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
            async for _, output in outputs:
                if last is None:  # not before: a prompt that is refused gets an error in place of a stream
                    start = {"role": "assistant", "content": ""}
                    yield self._chunk([_delta(index, start) for index in range(self.request.n)])
                last = output
                deltas = [delta for item in last.outputs for delta in streams[item.index].deltas(item)]
                if deltas:
                    yield self._chunk(deltas)
        assert last is not None
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield answers.event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(last)})
        yield answers.DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return answers.event({**self._head("chat.completion.chunk"), "choices": choices})

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        generated = sum(len(completion.token_ids) for completion in output.outputs)
        return answers.usage(len(output.prompt_token_ids), generated, output.num_cached_tokens)

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        text, calls = tool_calls.split(output.text) if self.request.offered_tools else (output.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        return {
            "index": output.index,
            "message": message,
            "logprobs": _logprobs(output, 0, self.request.top_logprobs or 0),
            "finish_reason": _reason(output, bool(calls)),
        }


class _Stream:
    """What of one completion was sent already."""

    def __init__(self, index: int, request: ChatRequest) -> None:
        self._index, self._has_tools = index, bool(request.offered_tools)
        self._top = request.top_logprobs or 0
        self._characters = self._tokens = 0
        self._done = False

    def deltas(self, output: CompletionOutput) -> list[dict[str, Any]]:
        """What is new in ``output``: its choices of the next event."""
        if self._done:
            return []
        deltas: list[dict[str, Any]] = []
        calls: list[tool_calls.ToolCall] = []
        text = output.text
        if self._has_tools and output.finished():
            text, calls = tool_calls.split(output.text)
            if calls and output.text[: len(text)] != text:  # its spaces were not known to be dropped
                text = output.text[: self._characters]
        elif self._has_tools:
            text = text[: tool_calls.settled(text)]
        new = text[self._characters :]
        if new or (output.logprobs and len(output.logprobs) > self._tokens):
            logprobs = _logprobs(output, self._tokens, self._top)
            deltas.append({**_delta(self._index, {"content": new}), "logprobs": logprobs})
            self._characters, self._tokens = self._characters + len(new), len(output.token_ids)
        if calls:
            bodies = [call.body(position) for position, call in enumerate(calls)]
            deltas.append(_delta(self._index, {"tool_calls": bodies}))
        if output.finished():
            self._done = True
            deltas.append(_delta(self._index, {}, _reason(output, bool(calls))))
        return deltas


def _delta(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _reason(output: CompletionOutput, called: bool) -> str | None:
    return "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason


def _logprobs(output: CompletionOutput, start: int, count: int) -> dict[str, Any] | None:
    """Log-probabilities of the tokens from ``start`` on, and of the ``count`` most likely ones beside each."""
    if output.logprobs is None:
        return None
    entries = []
    for token, likely in list(zip(output.token_ids, output.logprobs, strict=True))[start:]:
        ranked = sorted((entry for entry in likely.values() if entry.rank <= count), key=lambda entry: entry.rank)
        top = [_entry(entry.decoded_token, entry.logprob) for entry in ranked]
        entries.append({**_entry(likely[token].decoded_token, likely[token].logprob), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def _entry(token: str | None, logprob: float) -> dict[str, Any]:
    text = token or ""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
