"""The loop inside the sandbox: define the generated function once, then answer calls until the socket closes.

Two processes: the outer one waits, ends the inner one when the host is gone, and repeats its exit status; the inner
one locks itself down and only then compiles and runs the generated code. A message is 4 bytes of length, big-endian,
and that many bytes: marshal from the host (which is trusted), JSON to the host.
"""

from __future__ import annotations

import _signal  # the C module: "signal" would import enum, which costs more than all the rest here
import builtins
import marshal
import os
import resource
import select
import sys
from _json import encode_basestring_ascii as quote

import codec  # type: ignore[import-not-found]
import lockdown  # type: ignore[import-not-found]

TYPE_CHECKING = False  # as type checkers read it; importing typing would triple the start of the child
if TYPE_CHECKING:
    from typing import Any

_CHANNEL = 0
_NAME = "generated"
_MESSAGE_CHARACTERS = 1000
_BUILTIN_ERRORS = frozenset(
    value for value in vars(builtins).values() if isinstance(value, type) and issubclass(value, BaseException)
)


def main() -> None:
    """Read the set-up, fork, lock down, serve; ends with :func:`os._exit`."""
    for number in (_signal.SIGINT, _signal.SIGPIPE):
        _signal.signal(number, _signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = _receive()
    os.environ.clear()
    os.closerange(1, 256)
    _import_first(setup["modules"])
    libc = lockdown.open_libc()
    unused = frozenset(setup["without"])
    lockdown.be_killed_first()
    found = lockdown.outer(libc, unused)
    inner = os.fork()
    if inner:
        _supervise(inner)
    found = lockdown.inner(libc, unused, setup["limits"], found)
    missing = [name for name in setup["required"] if found[name]]
    _send(codec.encode({"layers": found, "ready": not missing}, quote))
    if missing:
        os._exit(3)
    _serve(setup)


def _supervise(inner: int) -> None:
    """Wait for the inner process or for the end of the host, then end as the inner process did."""
    poll = select.poll()
    poll.register(_CHANNEL, 0)  # reports only that the other end is closed
    watch = _process_descriptor(inner)
    if watch is not None:
        poll.register(watch, select.POLLIN)
    while True:
        ready = poll.poll(None if watch is not None else 100)
        if any(descriptor == _CHANNEL for descriptor, _ in ready):
            os.kill(inner, _signal.SIGKILL)
            ready = []
            watch = None
        done, status = os.waitpid(inner, os.WNOHANG if watch is None and not ready else 0)
        if done:
            break
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 255)


def _process_descriptor(process: int) -> int | None:
    try:
        return os.pidfd_open(process)
    except (OSError, AttributeError):
        return None


def _import_first(names: list[str]) -> None:
    """Import what the generated code asks for while files can still be read."""
    for name in ["encodings.ascii", "encodings.latin_1", *names]:
        try:
            __import__(name)
        except ImportError:  # the generated code meets the same error when it gets there
            continue


def _serve(setup: dict[str, Any]) -> None:
    printed = _Printed(setup["limits"]["output_bytes"])
    sys.stdin, sys.stdout, sys.stderr = None, printed, printed  # type: ignore[assignment]
    sys.path.clear()
    sys.argv, sys.orig_argv, sys.executable = [""], [], ""  # where the host's files are is none of its business
    namespace: dict[str, Any] = {"__name__": _NAME, "__builtins__": builtins}
    builtins.__import__ = _ImportGuard(builtins.__import__, frozenset(setup["available"]))  # type: ignore[assignment]
    number = _receive()
    with _Outcome() as outcome:
        # Running the generated code is what this process exists for; it has been locked in before this line.
        exec(compile(setup["source"], "<generated>", "exec", dont_inherit=True), namespace)  # noqa: S102
        outcome.value = callable(namespace.get(setup["name"]))
    _send(outcome.message(number, printed))
    function = namespace.get(setup["name"])
    while True:
        number, arguments, keywords = _receive()
        with _Outcome() as outcome:
            outcome.value = function(*arguments, **keywords)  # type: ignore[misc]
        del arguments, keywords
        _send(outcome.message(number, printed))


class _Outcome:
    """Holds what a block computed, or whatever it raised: here nothing that generated code raises may get out."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def __enter__(self) -> _Outcome:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error
        return error is not None

    def message(self, number: str, printed: _Printed) -> str:
        """The JSON answer to call ``number``."""
        with _Outcome() as writing:
            writing.value = "" if self.error is not None else codec.encode(self.value, quote)
        error = self.error if self.error is not None else writing.error
        self.value = self.error = None
        if error is None:
            body = f'"value":{writing.value}'
        else:
            body = f'"error":[{quote(_kind(error))},{quote(_text(error))}]'
        return f'{{"id":{quote(number)},{body},"output":{quote(printed.take())}}}'


def _kind(error: BaseException) -> str:
    """Name of the nearest builtin exception that the error is an instance of."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind in _BUILTIN_ERRORS)


def _text(error: BaseException) -> str:
    with _Outcome() as words:
        text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
        words.value = f"{text}"[:_MESSAGE_CHARACTERS]
    return words.value if type(words.value) is str else ""


class _Printed:
    """Standard output of the generated code: kept in memory up to a limit, then dropped."""

    encoding = "utf-8"
    errors = "strict"

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[str] = []
        self._kept = 0

    def write(self, text: str) -> int:
        room = self._limit - self._kept
        if room > 0:
            self._parts.append(text[:room])
            self._kept += len(text[:room])
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered elsewhere."""

    def isatty(self) -> bool:
        return False

    def take(self) -> str:
        """What was printed since the last time."""
        text = "".join(self._parts)
        self._parts.clear()
        self._kept = 0
        return text


class _ImportGuard:
    """Tells generated code which modules it has. A courtesy with a clear message; the kernel is the boundary."""

    def __init__(self, original: Any, available: frozenset[str]) -> None:
        self._original = original
        self._available = available

    def __call__(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if globals is not None and globals.get("__name__") == _NAME and name.partition(".")[0] not in self._available:
            raise ImportError(f"module '{name}' is not available to generated code")
        return self._original(name, globals, locals, fromlist, level)


def _receive() -> Any:
    size = int.from_bytes(_read(4), "big")
    return marshal.loads(_read(size))


def _read(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(_CHANNEL, min(size, 1 << 16))
        if not part:
            os._exit(0)  # the host has closed the channel
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(text: str) -> None:
    content = text.encode("ascii")
    view = memoryview(len(content).to_bytes(4, "big") + content)
    while view:
        view = view[os.write(_CHANNEL, view) :]
