"""Options of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from unsloth.core.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class ServeOptions:
    """Who may ask, and how much.

    Attributes:
        model_name: What the model is called in requests and answers.
        api_key: Requests must carry it as a bearer token; None asks for none, which only a loopback address may do.
        host: Address to listen on.
        port: Port to listen on.
        allowed_hosts: Host names, besides loopback's and ``host``, under which the server may be addressed.
        adapter_folder: Adapters are loaded on request from this folder and those in it; None refuses to load any.
        max_requests: Completions that are in flight at once, running or queued; more are answered with 429.
        max_body_bytes: Larger bodies are answered with 413.
        body_seconds: How long a body may take to arrive; after that it is answered with 408.
        max_completions: Largest n times number of prompts of one request.
        drain_seconds: How long requests in flight may go on once the server was told to stop.
    """

    model_name: str
    api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    adapter_folder: Path | None = None
    max_requests: int = 1024
    max_body_bytes: int = 8 * MIB
    body_seconds: float = 60.0
    max_completions: int = 128
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_body_bytes", "max_completions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", got=getattr(self, name))
        if not 0 <= self.port <= 65535:
            raise ConfigError("no such port", got=self.port, do="Use 1 to 65535, or 0 for any free one.")
        if self.body_seconds <= 0:
            raise ConfigError("body_seconds must be above 0", got=self.body_seconds)
        if self.drain_seconds < 0:
            raise ConfigError("drain_seconds must not be negative", got=self.drain_seconds)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("an API key is printable ASCII text", do="Make another, for instance with uuidgen.")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                "without an API key, anybody who can reach this address could use the model",
                got=self.host,
                do="Give a key, or listen on 127.0.0.1.",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
