"""What every request must pass before a route sees it: host, origin, key and size.

A page in a user's browser can send requests to loopback addresses too: by its own name that resolves there (so the
Host header must be one of ours) or across origins (so an Origin header must be ours as well).
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import Response

from unsloth.serve.answers import error_response
from unsloth.serve.options import ServeOptions, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware around a whole application; refuses with 403, 413, or by closing a web socket.

    Args:
        app: The application.
        options: Whom and what to let through.
    """

    def __init__(self, app: App, options: ServeOptions) -> None:
        self._app = app
        self._options = options
        names = {"localhost", "127.0.0.1", "::1", *options.allowed_hosts}
        self._hosts = names if is_loopback(options.host) else {*names, options.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._refusal(headers)
        if refusal is not None and scope["type"] == "http":
            await refusal(scope, receive, send)
        elif refusal is not None or scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, _Limited(receive, self._options), send)

    def _refusal(self, headers: list[tuple[bytes, str]]) -> Response | None:
        hosts, origins = _values(headers, b"host"), _values(headers, b"origin")
        if len(hosts) != 1 or _host_name(hosts[0]) not in self._hosts:
            return error_response(403, "this server is not known by the host name of the request", code="host")
        if origins and (len(origins) != 1 or not self._is_own(origins[0], hosts[0])):
            return error_response(403, "requests from pages of other origins are refused", code="origin")
        if not self._has_key(_values(headers, b"authorization")):
            return error_response(
                403,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
            )
        sizes = _values(headers, b"content-length")
        if sizes and (not sizes[0].isdigit() or int(sizes[0]) > self._options.max_body_bytes):
            return error_response(413, _too_large(self._options.max_body_bytes))
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        return origin.split("://", 1)[-1].lower() == host.lower() and "://" in origin

    def _has_key(self, sent: list[str]) -> bool:
        if self._options.api_key is None:
            return True
        if len(sent) != 1:
            return False
        scheme, _, key = sent[0].partition(" ")
        expected = self._options.api_key.encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), expected)


class _Limited:
    """``receive`` of a request, which ends it once its body is too long, or takes too long to arrive."""

    def __init__(self, receive: Receive, options: ServeOptions) -> None:
        self._receive, self._options, self._size, self._complete = receive, options, 0, False
        self._end = time.monotonic() + options.body_seconds

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._complete:  # what comes now is the client going away, whenever that is
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self._end - time.monotonic(), 0))
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive in {self._options.body_seconds:g} s") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._options.max_body_bytes:
                raise HTTPException(413, _too_large(self._options.max_body_bytes))
            self._complete = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit:,} bytes"


def _values(headers: list[tuple[bytes, str]], name: bytes) -> list[str]:
    return [value for key, value in headers if key == name]


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
