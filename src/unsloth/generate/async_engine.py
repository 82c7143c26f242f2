"""An engine in a thread of its own, for an event loop.

Everything that touches the engine happens in that thread: calls are put into a queue, which is emptied before each
step. Results go to their tasks through the event loop that those run in.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from unsloth.core.errors import GenerationError
from unsloth.core.log import get_logger
from unsloth.generate.engine import Engine
from unsloth.generate.outputs import RequestOutput
from unsloth.generate.protocol import EngineStats, Lora, LoRARequest, Prompt
from unsloth.generate.vllm_engine import VllmEngine

logger = get_logger(__name__)


class AsyncEngine:
    """See :class:`unsloth.generate.protocol.AsyncEngine`.

    Args:
        engine: Used by nobody else from now on.
    """

    def __init__(self, engine: Engine | VllmEngine) -> None:
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len
        self._engine = engine
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="unsloth-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> AsyncIterator[RequestOutput]:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.generate`."""
        if self._closing:
            raise GenerationError("the engine is being shut down", do="Send the request elsewhere, or later.")
        mailbox = _Mailbox(asyncio.get_running_loop())

        def add() -> str:
            name = self._engine.add_request(prompt, params, request_id=request_id, lora=lora)
            self._mailboxes[name] = mailbox
            return name

        # a cancelled task must still learn the request's name, or nobody could abort it
        added = self._submit(add)
        finished = False
        try:
            await asyncio.wrap_future(added)
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                added.add_done_callback(self._abort_added)

    async def answer(
        self, prompt: Prompt, params: Any = None, *, request_id: str | None = None, lora: Lora = None
    ) -> RequestOutput:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.answer`."""
        last: RequestOutput | None = None
        async for output in self.generate(prompt, params, request_id=request_id, lora=lora):
            last = output
        assert last is not None
        return last

    async def abort(self, request_id: str) -> bool:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.abort`."""
        return await asyncio.wrap_future(self._submit(lambda: self._engine.abort(request_id)))

    async def load_adapter(self, name: str, path: str) -> LoRARequest:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.load_adapter`."""
        return await asyncio.wrap_future(self._submit(lambda: self._engine.load_adapter(name, path)))

    async def unload_adapter(self, name: str) -> None:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.unload_adapter`."""
        await asyncio.wrap_future(self._submit(lambda: self._engine.unload_adapter(name)))

    def adapters(self) -> list[str]:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.adapters`."""
        return self._engine.known_adapters()

    def stats(self) -> EngineStats:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.stats`."""
        return self._engine.stats()

    async def shutdown(self, drain: float = 0.0) -> None:
        """See :meth:`unsloth.generate.protocol.AsyncEngine.shutdown`."""
        if self._closing and not self._thread.is_alive():
            return
        self._closing = True
        loop = asyncio.get_running_loop()
        end = loop.time() + drain
        while self._mailboxes and loop.time() < end:
            await asyncio.sleep(min(0.02, max(end - loop.time(), 0)))
        self._calls.put(None)
        await loop.run_in_executor(None, self._thread.join)

    def _submit(self, call: Callable[[], Any]) -> Future:
        if not self._thread.is_alive():
            raise GenerationError("the engine was shut down", do="Make another one.")
        future: Future = Future()
        self._calls.put((call, future))
        return future

    def _abort_added(self, added: Future) -> None:
        """Abort a request that nobody reads any more; in the engine's thread, or after it has added the request."""
        if added.cancelled() or added.exception() is not None or not self._thread.is_alive():
            return
        name = added.result()
        self._mailboxes.pop(name, None)
        self._submit(lambda: self._engine.abort(name))

    def _run(self) -> None:
        try:
            while self._serve_calls():
                if self._engine.has_unfinished():
                    self._deliver(self._engine.step())
            for name in list(self._mailboxes):
                self._engine.abort(name)
            self._deliver(self._engine.step())
            self._engine.shutdown()
        finally:  # whatever ended the thread, nobody is left waiting for it
            self._closing = True
            for mailbox in list(self._mailboxes.values()):
                mailbox.close()
            self._mailboxes.clear()
            self._refuse_calls()

    def _refuse_calls(self) -> None:
        while not self._calls.empty():
            entry = self._calls.get()
            if entry is not None and entry[1].set_running_or_notify_cancel():
                entry[1].set_exception(GenerationError("the engine was shut down", do="Make another one."))

    def _serve_calls(self) -> bool:
        """Make the calls that wait; without anything to compute, wait for one. False: the end."""
        block = not self._engine.has_unfinished()
        while True:
            try:
                entry = self._calls.get(block=block)
            except queue.Empty:
                return True
            if entry is None:
                return False
            _call(*entry)
            block = False

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if output.finished:
                self._mailboxes.pop(output.request_id, None)
            if mailbox is not None:
                mailbox.put(output)


def _call(call: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        future.set_result(result)


class _Mailbox:
    """Outputs of one request, from the engine's thread to a task; those not yet read become one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._latest: RequestOutput | None = None
        self._closed = False
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Leave an output; in the engine's thread."""
        with self._lock:
            if self._latest is not None:
                for new, old in zip(output.outputs, self._latest.outputs, strict=True):
                    new.new_text = old.new_text + new.new_text
                    new.new_token_ids = [*old.new_token_ids, *new.new_token_ids]
            self._latest = output
        self._wake()

    def close(self) -> None:
        """Nothing will come any more; in the engine's thread."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> RequestOutput:
        """The latest output, once there is one."""
        while True:
            await self._arrived.wait()
            with self._lock:
                output, self._latest = self._latest, None
                self._arrived.clear()
            if output is not None:
                return output
            if self._closed:
                raise GenerationError("the engine has stopped", do="The log says why.")
