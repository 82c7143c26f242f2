"""Signals that end a run: the trainer is told, and stops at the next point where a checkpoint can be made."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from unsloth.core.log import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

logger = get_logger(__name__)


class Interrupted(KeyboardInterrupt, SystemExit):
    """A run was stopped by Ctrl-C (SIGINT), after its checkpoint was written.

    It is a ``KeyboardInterrupt`` for those who catch one, and a ``SystemExit`` so that a script which catches
    nothing ends with exit code 130 and without a traceback.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class StopRequested(BaseException):
    """Unwinds the training loop; :meth:`Listener.leave` is what the caller of the trainer sees instead."""


class Listener:
    """Remembers the first signal that asked the run to end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def check(self) -> None:
        """Raise :class:`StopRequested` if a signal has arrived."""
        if self.received is not None:
            raise StopRequested

    def leave(self) -> BaseException:
        """The exception that ends the process with 128 + the signal's number: 130, 143, or 129 for SIGHUP.

        In a notebook or an interactive session, SIGINT means a plain ``KeyboardInterrupt``.
        """
        if self.received is None:
            raise RuntimeError("no signal has arrived")
        code = 128 + self.received
        if self.received != signal.SIGINT:
            return SystemExit(code)
        return KeyboardInterrupt() if _is_interactive() else Interrupted(code)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Listen for SIGTERM, SIGINT and SIGHUP while the block runs; the earlier handlers are back afterwards.

    The first signal is remembered. A second one has its default effect, which is to end the process at once (in an
    interactive session, ``KeyboardInterrupt``). Signals that were ignored (``nohup``) stay ignored. Outside the main
    thread, where Python allows no handlers, nothing is changed.
    """
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    owner = os.getpid()
    before: dict[signal.Signals, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data loading worker: its parent decides
            return
        listener.received = signal.Signals(number)
        for name in before:
            interactive = name == signal.SIGINT and _is_interactive()
            signal.signal(name, signal.default_int_handler if interactive else signal.SIG_DFL)
        # Not through logging, which could wait for a lock that the interrupted code holds.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\nunsloth: {listener.received.name}: stopping after this step; again: at once\n".encode())

    try:
        for name in SIGNALS:
            if signal.getsignal(name) not in (signal.SIG_IGN, None):
                before[name] = signal.signal(name, remember)
        yield listener
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
