"""Logging: one logger tree named ``unsloth``, plain lines on standard error."""

from __future__ import annotations

import logging
import sys

from unsloth.core import settings

_ROOT = "unsloth"


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is now, so that notebooks and tests capture it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Printable(logging.Filter):
    """Makes messages that any handler can write, and lets a repeated one through once if it asks for that.

    A byte of a file name that is not UTF-8 has no encoding; it is written as an escape. A record marked
    ``extra={"once": True}`` passes the first time only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage().encode("utf-8", "backslashreplace").decode("utf-8")
        record.msg, record.args = message, ()
        if not getattr(record, "once", False):
            return True
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger for a module (``get_logger(__name__)``); sets the tree up on first use.

    Pass ``extra={"once": True}`` with a message that repeats on every step.
    """
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter("unsloth: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel(logging.DEBUG if settings.verbose_logging() else logging.INFO)
    logger = logging.getLogger(name)
    if name.startswith(_ROOT) and not any(isinstance(f, _Printable) for f in logger.filters):
        logger.addFilter(_Printable())
    return logger
