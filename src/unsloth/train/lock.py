"""One run a folder: a lock on the output folder, held while a trainer writes to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from unsloth.core.artifact import readable_os_errors
from unsloth.core.errors import StorageError
from unsloth.core.log import get_logger

NAME = ".unsloth.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

logger = get_logger(__name__)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock on ``folder`` while the block runs.

    The kernel drops the lock when its process ends, however it ends, so a dead run never blocks a new one; the file
    itself only says who holds it. Processes forked from the holder do not keep the lock alive.

    Raises:
        StorageError: Another run holds it; names its process and host.
    """
    path = folder / NAME
    with readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    if lock is None:
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


class _Descriptor:
    """An open file descriptor that a forked child closes at once, since a lock lives as long as any copy of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_open = True
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(reference()))

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self.number)


def _close(descriptor: _Descriptor | None) -> None:
    if descriptor is not None:
        descriptor.close()


def _acquire(path: Path) -> _Descriptor | None:
    """The locked descriptor; None where the file system has no locks."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(number, 1000, 0)
            os.close(number)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _refusal(path.parent, holder) from error
            if error.errno in _UNSUPPORTED:
                logger.warning("%s is on a file system without locks: start one run at a time there", path.parent)
                return None
            raise
        if _is_still(path, number):
            break
        os.close(number)  # its holder removed the file between our opening and locking it
    started = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(number, 0)
    os.pwrite(number, json.dumps(content).encode(), 0)
    return _Descriptor(number)


def _is_still(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except FileNotFoundError:
        return False


def _refusal(folder: Path, content: bytes) -> StorageError:
    try:
        holder = json.loads(content)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        who = "a process that did not leave its name"
    return StorageError(
        f"another run is writing to {folder} ({who})", do="Choose another output_dir, or wait until that run has ended."
    )
