"""The sandbox's process as the host sees it: start it, exchange messages within a deadline, end it with all it has."""

from __future__ import annotations

import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from unsloth.core import settings

_ENTRY = Path(__file__).with_name("child") / "main.py"
_END_SECONDS = 2.0


class ChildTimeoutError(TimeoutError):
    """The deadline passed."""


class ChildEndedError(RuntimeError):
    """The process is gone. ``code`` as in :attr:`subprocess.Popen.returncode`."""

    def __init__(self, code: int) -> None:
        super().__init__(describe_end(code))
        self.code = code


class ChildAnswerError(ValueError):
    """What came through the channel is not an answer to what was asked."""


class Child:
    """One process and the socket to it. Its standard streams lead nowhere and its environment is empty.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self) -> None:
        channel, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable or "python3", "-I", "-S", "-E", str(_ENTRY)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=settings.loader_environment(),
                cwd="/",
                close_fds=True,
                start_new_session=True,
            )
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        self.owner = os.getpid()
        self._channel = channel
        self._finalizer = weakref.finalize(self, _end, self._process, channel, self.owner)

    @property
    def identity(self) -> int:
        """Process id of the outer process, which is the leader of a process group of its own."""
        return self._process.pid

    def send(self, message: Any, deadline: float) -> None:
        """Send plain values.

        Raises:
            ChildEndedError: The child is gone.
            ChildTimeoutError: It did not take the message before ``deadline`` (of :func:`time.monotonic`).
        """
        content = marshal.dumps(message)
        self._channel.settimeout(_remaining(deadline))
        try:
            self._channel.sendall(len(content).to_bytes(4, "big") + content)
        except TimeoutError:
            raise ChildTimeoutError from None
        except OSError:
            raise ChildEndedError(self.end()) from None

    def receive(self, limit: int, deadline: float) -> dict[str, Any]:
        """The next message, an object of JSON, of at most ``limit`` bytes.

        Raises:
            ChildAnswerError: It is longer, or no such object.
            ChildEndedError: The process is gone.
            ChildTimeoutError: It did not come before ``deadline``.
        """
        size = int.from_bytes(self._read(4, deadline), "big")
        if size > limit:
            raise ChildAnswerError(f"an answer of {size:,} bytes, more than the {limit:,} allowed")
        content = self._read(size, deadline)
        try:
            message = json.loads(content.decode("ascii"), parse_int=_short_integer)
        except (ValueError, RecursionError) as error:
            raise ChildAnswerError("an answer that is not JSON") from error
        if type(message) is not dict:
            raise ChildAnswerError("an answer that is not an object")
        return message

    def is_waiting(self) -> bool:
        """Whether it is alive and has written nothing that nobody asked for."""
        try:
            self._channel.setblocking(False)
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def end(self) -> int:
        """End the process and everything it started, and wait for it; returns its exit code."""
        _end(self._process, self._channel, self.owner)
        self._finalizer.detach()
        return self._process.returncode if self._process.returncode is not None else -signal.SIGKILL

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            self._channel.settimeout(_remaining(deadline))
            try:
                part = self._channel.recv(min(size, 1 << 18))
            except TimeoutError:
                raise ChildTimeoutError from None
            except OSError:
                part = b""
            if not part:
                raise ChildEndedError(self.end())
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def describe_end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it left with exit code {code}"
    try:
        return f"it ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it ended by signal {-code}"


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise ChildTimeoutError
    return remaining


def _short_integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError("an integer of too many digits")
    return int(text)


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    """Close the channel, upon which the outer process ends the inner one, waits for it and leaves.

    Killing the outer one at once would leave the inner one's entry to whatever process adopts orphans. May be called
    again, also after it was interrupted.
    """
    if os.getpid() != owner:  # a fork of the host has its own copy of the socket, not of the child
        channel.close()
        return
    try:
        channel.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other end is closed already
        pass
    channel.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
