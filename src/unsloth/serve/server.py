"""Running the application: a socket of our own, so that a taken port is an error with a remedy, and a clean end."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from unsloth.core.errors import ConfigError, StorageError
from unsloth.generate.protocol import AsyncEngine
from unsloth.serve.guard import App
from unsloth.serve.options import ServeOptions

_GRACE = 5  # seconds beyond the drain, for answers that were aborted to reach their clients


def listen(options: ServeOptions) -> socket.socket:
    """A socket that listens on the host and port of ``options``.

    Raises:
        ConfigError: The port is taken or may not be used, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("cannot listen on this address", got=options.host, do=f"{error.strerror}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        remedy = "Another server may be running; choose another --port." if taken else f"{error.strerror}."
        raise ConfigError("cannot listen", got=f"{options.host}:{options.port}", do=remedy) from error
    return listener


def run(
    app: App, engine: AsyncEngine, options: ServeOptions, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C: then take nothing new, finish what is in flight or abort it after a while.

    Args:
        app: The application.
        engine: Its engine, which is shut down at the end.
        options: Its options.
        listener: From :func:`listen`.
        ready: Called once requests are taken.
    """
    make(app, engine, options, ready).run(sockets=[listener])


def make(app: App, engine: AsyncEngine, options: ServeOptions, ready: Callable[[], None]) -> uvicorn.Server:
    """The server that :func:`run` runs."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(options.drain_seconds) + _GRACE,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
    )
    return _Server(config, engine, options.drain_seconds, ready)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, drain_seconds: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._drain, self._ready = engine, drain_seconds, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._engine.shutdown(drain=self._drain))
        await super().shutdown(sockets=sockets)
        await ending


def read_key(path: Path) -> str:
    """The API key in the first line of a file.

    Raises:
        ConfigError: There is no such file, or it is empty.
    """
    try:
        lines = path.read_text("utf-8").split("\n", 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file of the API key cannot be read", got=path, do=f"{error}.") from error
    if not lines[0].strip():
        raise ConfigError("the file of the API key is empty", got=path, do="Write the key into its first line.")
    return lines[0].strip()


def make_key(path: Path) -> str:
    """A new API key, written to a file that only its owner can read; an old file is replaced.

    Raises:
        StorageError: The file cannot be written.
    """
    key = secrets.token_urlsafe(32)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
        os.replace(staged, path)
    except OSError as error:
        raise StorageError("the API key cannot be written", got=path, do=f"{error.strerror}.") from error
    return key
