"""The routes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from unsloth.core.errors import AdapterError, GenerationError, TokenizerError, UnslothError
from unsloth.core.log import get_logger
from unsloth.generate.protocol import AsyncEngine
from unsloth.serve import answers
from unsloth.serve.chat import ChatAnswer
from unsloth.serve.chat_prompt import ChatPrompt
from unsloth.serve.completions import TextAnswer
from unsloth.serve.guard import App, Guard
from unsloth.serve.options import ServeOptions
from unsloth.serve.requests import ChatRequest, CompletionRequest, LoadAdapterRequest, UnloadAdapterRequest
from unsloth.serve.service import Service, unless_disconnected

logger = get_logger(__name__)


def build(engine: AsyncEngine, options: ServeOptions, sampling_defaults: Mapping[str, Any] | None = None) -> App:
    """An ASGI application.

    Args:
        engine: Answers the requests; it stays its owner's.
        options: The rules.
        sampling_defaults: Sampling parameters of requests that do not set them.
    """
    service = Service(engine, options, sampling_defaults)
    app = FastAPI(title="unsloth", docs_url=None, redoc_url=None)
    _handle_errors(app)
    _add_model_routes(app, service)
    _add_adapter_routes(app, service)
    _add_completion_routes(app, service)
    return Guard(app, options)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        own = service.options.model_name
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "unsloth",
            "root": own,
            "parent": None if name == own else own,
            "max_model_len": service.engine.max_model_len,
        }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        stats = service.engine.stats()
        return {"status": "ok", "running": stats.running, "waiting": stats.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in service.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.lora(name)
        return card(name)


def _add_adapter_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest) -> dict[str, Any]:
        path = service.adapter_path(body.lora_path)
        if body.lora_name == service.options.model_name:
            raise HTTPException(400, f"{body.lora_name!r} is the name of the model itself")
        await service.engine.load_adapter(body.lora_name, path)
        return {"message": f"adapter {body.lora_name!r} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> dict[str, Any]:
        if body.lora_name not in service.engine.adapters():
            raise HTTPException(404, f"no adapter {body.lora_name!r}. There are: {service.engine.adapters()}.")
        await service.engine.unload_adapter(body.lora_name)
        return {"message": f"adapter {body.lora_name!r} is unloaded"}


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    prompts: list[ChatPrompt] = []

    def chat_tokens(body: ChatRequest) -> list[int]:
        if not prompts:
            prompts.append(ChatPrompt(service.engine.tokenizer))
        return prompts[0].tokens(body)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.lora(body.model)
        tokens = await anyio.to_thread.run_sync(chat_tokens, body)
        return await _answer(service, ChatAnswer(service, body, tokens), body.n, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        count = len(body.prompts()) * body.n
        if not count:
            raise HTTPException(400, "'prompt' is an empty list")
        return await _answer(service, TextAnswer(service, body), count, request)


async def _answer(service: Service, answer: ChatAnswer | TextAnswer, count: int, request: Request) -> Response:
    """The answer, whole or streamed; errors in the request are known before the first byte is sent."""
    if not answer.request.stream:
        with service.admitted(count):
            return JSONResponse(await unless_disconnected(request, answer.whole()))
    events = _admitted_events(service, answer, count)
    first = await anext(events)
    return _Streamed(first, events)


async def _admitted_events(service: Service, answer: ChatAnswer | TextAnswer, count: int) -> AsyncIterator[bytes]:
    with service.admitted(count):
        async with contextlib.aclosing(answer.events()) as events:  # type: ignore[type-var]
            async for event in events:
                yield event


class _Streamed(StreamingResponse):
    """Events, of which the first was waited for already; closes their source however it ends."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes]) -> None:
        self._events = events
        super().__init__(self._all(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _all(self, first: bytes) -> AsyncIterator[bytes]:
        try:
            yield first
            async for event in self._events:
                yield event
        except (UnslothError, HTTPException) as error:
            logger.error("a streamed answer broke off: %s", error)
            yield answers.event(answers.error_body(str(error), kind="server_error"))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()  # type: ignore[attr-defined]


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> Response:
        code = "model_not_found" if error.status_code == 404 else None
        response = answers.error_response(error.status_code, str(error.detail), code=code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return answers.error_response(400, _describe(error))

    @app.exception_handler(UnslothError)
    async def on_ours(_: Request, error: UnslothError) -> Response:
        if isinstance(error, GenerationError):
            return answers.error_response(503, str(error), kind="server_error")
        if isinstance(error, TokenizerError | AdapterError):
            return answers.error_response(400, str(error), code="model_cannot")
        return answers.error_response(400, str(error))

    @app.exception_handler(Exception)
    async def on_any(_: Request, error: Exception) -> Response:
        return answers.error_response(500, f"the server failed: {type(error).__name__}", kind="server_error")


def _describe(error: RequestValidationError) -> str:
    """What is wrong with a body, in one line, without the body itself."""
    told = []
    for item in error.errors()[:3]:
        where = ".".join(str(part) for part in item["loc"] if part != "body")
        told.append(f"{where}: {item['msg']}" if where else str(item["msg"]))
    return "; ".join(told)
