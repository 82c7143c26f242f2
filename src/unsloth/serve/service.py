"""What the routes share: which model or adapter a request means, whether there is room for it, and its outputs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from unsloth.core.errors import GenerationError
from unsloth.generate.outputs import RequestOutput
from unsloth.generate.protocol import AsyncEngine, Lora, Prompt
from unsloth.generate.sampling import SamplingParams
from unsloth.serve.options import ServeOptions

T = TypeVar("T")


class Service:
    """An engine and the rules of a server.

    Args:
        engine: Answers the requests.
        options: The rules.
        sampling_defaults: Sampling parameters of requests that do not set them.
    """

    def __init__(
        self, engine: AsyncEngine, options: ServeOptions, sampling_defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.engine, self.options = engine, options
        self.sampling_defaults = dict(sampling_defaults or {})
        self._in_flight = 0

    def models(self) -> list[str]:
        """Names that a request may give as its model: the model's and the adapters'."""
        return [self.options.model_name, *self.engine.adapters()]

    def lora(self, model: str) -> Lora:
        """What the engine is to apply for a request that names ``model``.

        Raises:
            HTTPException: 404, there is no such model.
        """
        if model == self.options.model_name:
            return None
        if model in self.engine.adapters():
            return model
        raise HTTPException(404, f"no model {model!r} here. There are: {', '.join(self.models())}.")

    @contextmanager
    def admitted(self, completions: int) -> Iterator[None]:
        """Room for this many completions, while they are computed or wait for it.

        Raises:
            HTTPException: 400, one request asks for too many; 429, there are too many of all requests.
        """
        if completions > self.options.max_completions:
            limit = self.options.max_completions
            raise HTTPException(400, f"a request may ask for {limit} completions, this one asks for {completions}")
        if self._in_flight + completions > self.options.max_requests:
            raise HTTPException(
                429,
                f"{self._in_flight} completions are in flight, the server takes {self.options.max_requests}; try later",
                headers={"Retry-After": "1"},
            )
        self._in_flight += completions
        try:
            yield
        finally:
            self._in_flight -= completions

    async def outputs(
        self, prompts: Sequence[Prompt], params: SamplingParams, lora: Lora
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs of several prompts as they come, each with its prompt's position; closing it aborts them all.

        Raises:
            UnslothError: A prompt or the parameters are wrong; before the first output.
            GenerationError: The engine failed in the middle.
        """
        arrived: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue(maxsize=2 * len(prompts))
        tasks = [
            asyncio.create_task(self._forward(position, prompt, params, lora, arrived))
            for position, prompt in enumerate(prompts)
        ]
        unfinished = len(tasks)
        try:
            while unfinished:
                position, output = await arrived.get()
                if output is None:
                    await tasks[position]  # raises what ended it, if anything did
                    unfinished -= 1
                    continue
                if output.error is not None:
                    raise GenerationError("the engine failed", got=output.error)
                yield position, output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(
        self, position: int, prompt: Prompt, params: SamplingParams, lora: Lora, arrived: asyncio.Queue
    ) -> None:
        """Put the outputs of one prompt into the common queue, and None at the end."""
        try:
            async with aclosing(self.engine.generate(prompt, params, lora=lora)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    await arrived.put((position, output))
        finally:
            await arrived.put((position, None))

    def adapter_path(self, given: str) -> str:
        """The folder of an adapter that may be loaded on request.

        Raises:
            HTTPException: 403, it is not in the folder for adapters, or there is no such folder; 404, it is not there.
        """
        root = self.options.adapter_folder
        if root is None:
            raise HTTPException(403, "this server loads no adapters on request; start it with --adapter-folder")
        if "\0" in given:
            raise HTTPException(400, "lora_path has a zero byte in it")
        path = (root / Path(given)).resolve()
        if not path.is_relative_to(root.resolve()):
            raise HTTPException(403, "lora_path is outside the folder that this server takes adapters from")
        if not os.path.isdir(path):  # false, too, for names that the file system cannot have
            raise HTTPException(404, f"no folder {given!r} of an adapter")
        return str(path)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client goes away.

    Raises:
        asyncio.CancelledError: It did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise asyncio.CancelledError("the client is gone")
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
