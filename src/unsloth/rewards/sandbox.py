"""Run functions that a model wrote, in a process that has nothing to lose or to tell.

:class:`SandboxedFunction` sends arguments to a child process and gets plain values back. What the child is kept from,
and by which layers, is in :mod:`unsloth.rewards.child.lockdown`; what reaches the host is rebuilt by
:mod:`unsloth.rewards.child.codec`.

What it covers: files (read or write, the interpreter's own included), network, environment, other processes, threads,
descriptors of the host, memory, processor and wall-clock time, size of results and of printed text, exceptions of
every kind, objects with methods of their own, answers written to the channel without being asked.

What it does not cover:

- Bugs of the kernel's system calls that stay allowed (memory, clocks, reading and writing one socket), and the
  processor's side channels.
- State between calls of one function: it lives in one process and may remember earlier arguments. Use
  :meth:`SandboxedFunction.restart`, or :mod:`unsloth.rewards.hacking`, where that matters.
- What arguments say: never pass the expected answer. Compare in the host.
- Level ``"process"`` without seccomp: whatever the missing layers would have stopped; see
  :attr:`SandboxedFunction.boundary`.
- The memory limit is of one process, in address space; a kernel that runs out of memory earlier is reported as the
  sandbox's own failure.
"""

from __future__ import annotations

import builtins
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from unsloth.core.errors import (
    ConfigError,
    GeneratedCodeError,
    SandboxKilledError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from unsloth.rewards import infra, source_check, time_limit
from unsloth.rewards.child import codec
from unsloth.rewards.process import Child, ChildAnswerError, ChildEndedError, ChildTimeoutError

Level = Literal["strict", "standard", "process"]
Status = Literal["ok", "error", "timeout", "killed", "infra"]

LAYERS = ("limits", "namespaces", "empty_root", "capabilities", "landlock", "seccomp")
_MESSAGE_CHARACTERS = 1000
# What it printed and its errors are shown, and must not command a terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "strict": LAYERS,
    "standard": ("limits", "capabilities", "seccomp"),
    "process": ("limits",),
}
_BUILTIN_ERRORS = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception) and not issubclass(value, BaseExceptionGroup)
}


@dataclass(frozen=True)
class SandboxConfig:
    """How strong the boundary must be, and what a function may use.

    Args:
        level: ``"standard"`` needs seccomp, resource limits and the loss of all capabilities, which together deny
            files, network, processes and threads, and adds namespaces and Landlock where the kernel has them.
            ``"strict"`` needs every layer. ``"process"`` is weaker and has to be asked for: a separate process with
            resource limits and whatever else there is; without namespaces and seccomp, what the code starts may
            outlive it.
        seconds: Wall-clock limit of a call (and of defining the function), above 0.
        start_seconds: How long starting the process may take.
        memory_bytes: Address space of the process.
        cpu_seconds: Processor time of one process over all its calls, above ``seconds``; before it is used up, the
            function gets a new process.
        result_bytes: Longest result, as JSON.
        output_bytes: Printed characters that are kept of a call; the rest is dropped.
        without: Layers not to use, by name. A level that needs one of them then fails.
    """

    level: Level = "standard"
    seconds: float = 5.0
    start_seconds: float = 30.0
    memory_bytes: int = 512 << 20
    cpu_seconds: int = 120
    result_bytes: int = 1 << 20
    output_bytes: int = 64 << 10
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ConfigError("unknown level of the sandbox", got=self.level, do=f"Use one of {get_args(Level)}.")
        for name in ("seconds", "start_seconds", "memory_bytes", "cpu_seconds", "result_bytes", "output_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number", got=value, do="Leave it out for the default.")
        if self.seconds >= self.cpu_seconds:
            raise ConfigError(
                "the limit of a call is not below the processor time of the process",
                got=(self.seconds, self.cpu_seconds),
                do="Raise cpu_seconds.",
            )
        unknown = set(self.without) - set(LAYERS)
        if unknown:
            raise ConfigError("unknown layers", got=sorted(unknown), do=f"The layers are {LAYERS}.")


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        status: ``"ok"``; ``"error"``: the code raised, or returned what cannot be sent; ``"timeout"``; ``"killed"``:
            it ended its process; ``"infra"``: the sandbox failed, which says nothing about the code and must be
            masked, not scored.
        value: The result if ``"ok"``.
        error: The exception otherwise: for ``"error"`` mostly the builtin type that the code raised.
        output: What it printed, cut, without control characters but line breaks and tabs.
        seconds: Wall-clock time seen by the host.
    """

    status: Status
    value: Any
    error: Exception | None
    output: str
    seconds: float

    def unwrap(self) -> Any:
        """The value; raises :attr:`error` unless the status is ``"ok"``."""
        if self.error is not None:
            raise self.error
        return self.value


class SandboxedFunction:
    """A function defined by generated source; calling it runs it in a child process of its own.

    Arguments and results are copied: ``None``, bool, int, float, str, bytes, list, tuple, set, frozenset and dict, and
    as arguments also arrays and tensors, which arrive as nested lists. Calls from several threads wait for each
    other. After a timeout or a crash the next call gets a new process.

    Args:
        source: Python source. It may define and import whatever it likes; see
            :func:`unsloth.create_locked_down_function` for one function without globals.
        name: The function to call; by default the first at the top level that no other one uses.
        config: Limits and level.

    Raises:
        SyntaxError: The source is not Python.
        GeneratedCodeError: It defines no such function, or left it uncallable.
        Exception: Whatever builtin exception defining it raised.
        SandboxTimeoutError, SandboxKilledError: Defining it took too long, or ended the process.
        SandboxUnavailableError: The boundary cannot be had here; the message names the layer and the reason.
    """

    def __init__(self, source: str, name: str | None = None, *, config: SandboxConfig | None = None) -> None:
        self._prepare(source, name, config)
        self.ready().unwrap()

    @classmethod
    def attempt(cls, source: str, name: str | None = None, *, config: SandboxConfig | None = None) -> Outcome:
        """Define a function without raising: the outcome's value is the function if its status is ``"ok"``."""
        function = cls.__new__(cls)
        try:
            function._prepare(source, name, config)
        except (SyntaxError, GeneratedCodeError) as error:
            return Outcome("error", None, error, "", 0.0)
        outcome = function.ready()
        return replace(outcome, value=function if outcome.status == "ok" else None)

    def _prepare(self, source: str, name: str | None, config: SandboxConfig | None) -> None:
        tree = source_check.parse(source)
        self.config = config or SandboxConfig()
        self.source = source
        self.__name__ = source_check.entry(tree, name)
        self._modules = source_check.to_import_first(tree)
        self._lock = threading.RLock()
        self._child: Child | None = None
        self._spent = 0.0
        self._is_new = True
        self._boundary: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            Exception: The builtin exception that it raised; ``RuntimeError`` for ``StopIteration``.
            TypeError: An argument or the result is not plain.
            GeneratedCodeError: It raised ``SystemExit`` or the like, or its answer was too long.
            SandboxTimeoutError, SandboxKilledError, SandboxUnavailableError: As the statuses of :class:`Outcome`.
        """
        return self.run(*args, **kwargs).unwrap()

    def __repr__(self) -> str:
        return f"<sandboxed function {self.__name__}>"

    @property
    def boundary(self) -> dict[str, str]:
        """Layer → empty if it holds, else why it is missing."""
        return dict(self._boundary)

    def run(self, *args: Any, **kwargs: Any) -> Outcome:
        """Call the function and tell what happened; raises only for arguments that are not plain (``TypeError``)."""
        try:
            arguments = [codec.plain(argument) for argument in args]
            keywords = {key: codec.plain(argument) for key, argument in kwargs.items()}
        except codec.NotPlainError as error:
            raise TypeError(f"an argument of generated code must be plain data, not {error}") from None
        return self._guarded(lambda: self._exchange(arguments, keywords))

    def ready(self) -> Outcome:
        """Have a process in which the function is defined, so that the next call does not wait for one."""
        return self._guarded(self._ready)

    def restart(self) -> None:
        """End the process; the next call gets a new one, which knows nothing of earlier calls."""
        with self._lock:
            child, self._child = self._child, None
            if child is not None:
                child.end()

    close = restart

    def _guarded(self, step: Callable[[], Outcome]) -> Outcome:
        """Run one step of the conversation with the child, alone; whatever breaks it costs the child its life."""
        with time_limit.shielded():  # its end is kept to here, and must not hit in the middle of an exchange
            return self._guarded_in_time(step)

    def _guarded_in_time(self, step: Callable[[], Outcome]) -> Outcome:
        start = time.monotonic()
        if not self._lock.acquire(timeout=min(max(time_limit.deadline() - start, 0.0), threading.TIMEOUT_MAX)):
            return Outcome("timeout", None, self._too_long(), "", time.monotonic() - start)
        try:
            outcome = self._finished(step)
            self._spent += time.monotonic() - start
        finally:
            self._lock.release()
        if outcome.status == "infra":
            infra.record(str(outcome.error))
        return replace(outcome, seconds=time.monotonic() - start)

    def _finished(self, step: Callable[[], Outcome]) -> Outcome:
        finished = False
        try:
            outcome = step()
            finished = outcome.status in ("ok", "error")
        except ChildTimeoutError:
            outcome = self._failed("timeout", self._too_long())
        except ChildAnswerError as error:
            refused = GeneratedCodeError(f"refused what came from generated code: {error}", do="Treat it as failed.")
            outcome = self._failed("error", refused)
        except ChildEndedError as error:
            outcome = self._ended(error)
        finally:
            if not finished:  # also when the host is interrupted in the middle of an exchange
                self.restart()
        return outcome

    def _exchange(self, arguments: list[Any], keywords: dict[str, Any]) -> Outcome:
        try:
            return self._ask(arguments, keywords)
        except ChildAnswerError:
            if self._is_new:
                raise
        self.restart()  # what an earlier call left in the channel must not decide about this one
        return self._ask(arguments, keywords)

    def _ask(self, arguments: list[Any], keywords: dict[str, Any]) -> Outcome:
        worn_out = self._spent + self.config.seconds >= self.config.cpu_seconds
        if worn_out or (self._child is not None and not self._child.is_waiting()):
            self.restart()
        ready = self._ready()
        if ready.status != "ok":
            return ready
        assert self._child is not None
        number = secrets.token_hex(8)
        deadline = self._deadline(self.config.seconds)
        self._child.send((number, arguments, keywords), deadline)
        answer = self._answer(number, deadline)
        self._is_new = False
        return answer

    def _ready(self) -> Outcome:
        """Have a child in which the function is defined."""
        if self._child is not None and self._child.owner != os.getpid():
            self._child = None  # the host has forked: the child belongs to the other one
        if self._child is not None:
            return Outcome("ok", None, None, "", 0.0)
        failure = self._start()
        if failure is not None and failure.status == "infra" and not self._missing():
            failure = self._start()  # a full process table or a busy machine may be over
        return failure or self._define()

    def _start(self) -> Outcome | None:
        """Start and lock down a child; the failure, or None."""
        self.restart()
        try:
            self._child = Child()
            self._spent, self._is_new = 0.0, True
            deadline = self._deadline(self.config.start_seconds)
            self._child.send(self._setup(), deadline)
            report = codec.decode(self._child.receive(1 << 16, deadline))
        except ChildTimeoutError:
            if time.monotonic() >= time_limit.deadline():
                raise
            return self._unavailable(f"its process was not ready after {self.config.start_seconds:g} seconds")
        except (OSError, ChildEndedError, ChildAnswerError, codec.NotPlainError) as error:
            return self._unavailable(f"its process did not start ({error})")
        self._boundary = report["layers"]
        if report["ready"]:
            return None
        return self._unavailable("; ".join(f"{name}: {self._boundary[name]}" for name in self._missing()))

    def _missing(self) -> list[str]:
        return [name for name in _REQUIRED[self.config.level] if self._boundary.get(name)]

    def _setup(self) -> dict[str, Any]:
        limits = ("memory_bytes", "cpu_seconds", "output_bytes")
        return {
            "source": self.source,
            "name": self.__name__,
            "modules": self._modules,
            "available": [*source_check.AVAILABLE, *self._modules],
            "without": list(self.config.without),
            "required": list(_REQUIRED[self.config.level]),
            "limits": {name: int(getattr(self.config, name)) for name in limits},
        }

    def _define(self) -> Outcome:
        assert self._child is not None
        number = secrets.token_hex(8)
        deadline = self._deadline(self.config.seconds)
        self._child.send(number, deadline)
        outcome = self._answer(number, deadline)
        if outcome.status == "ok" and outcome.value is not True:
            error = GeneratedCodeError(f"{self.__name__} is not a function", do="Treat it as failed.")
            outcome = Outcome("error", None, error, outcome.output, outcome.seconds)
        if outcome.status != "ok":
            self.restart()
        return outcome

    def _deadline(self, seconds: float) -> float:
        return min(time_limit.deadline(), time.monotonic() + seconds)

    def _answer(self, number: str, deadline: float) -> Outcome:
        assert self._child is not None
        # a printed character takes up to 12 bytes as escaped JSON
        limit = int(self.config.result_bytes + 12 * self.config.output_bytes) + 65536
        message = self._child.receive(limit, deadline)
        output = message.get("output")
        if message.get("id") != number or type(output) is not str:
            raise ChildAnswerError("an answer to something else")
        output = _printable(output[: int(self.config.output_bytes)]).translate(_CONTROLS)
        if "value" in message:
            try:
                return Outcome("ok", codec.decode(message["value"]), None, output, 0.0)
            except (codec.NotPlainError, RecursionError, TypeError) as error:
                raise ChildAnswerError(f"a result that is not plain data ({error})") from None
        return Outcome("error", None, _error(message.get("error")), output, 0.0)

    def _too_long(self) -> SandboxTimeoutError:
        return SandboxTimeoutError(
            f"generated function {self.__name__} took longer than its limit", do="Score it as too slow."
        )

    def _failed(self, status: Status, error: Exception) -> Outcome:
        return Outcome(status, None, error, "", 0.0)

    def _ended(self, error: ChildEndedError) -> Outcome:
        # Nothing in the locked-down process can send SIGKILL, so it came from the kernel or an administrator.
        if error.code == -signal.SIGKILL and not self._boundary.get("seccomp"):
            return self._unavailable("its process was killed from outside, perhaps for lack of memory")
        killed = SandboxKilledError(f"generated function {self.__name__} ended its process: {error}", do="Score it so.")
        return self._failed("killed", killed)

    def _unavailable(self, reason: str) -> Outcome:
        weaker = "" if self.config.level == "process" else ' or choose SandboxConfig(level="process"), which is weaker'
        error = SandboxUnavailableError(
            f"the sandbox is not available: {reason}", do=f"Allow it on this machine{weaker}. Do not score this as 0."
        )
        return self._failed("infra", error)


def _error(described: Any) -> Exception:
    """The exception that the child described as [name of a builtin exception, text]."""
    if type(described) is not list or len(described) != 2 or not all(type(part) is str for part in described):
        raise ChildAnswerError("an error without a name and a text")
    name, text = described[0], _printable(described[1][:_MESSAGE_CHARACTERS]).translate(_CONTROLS)
    if name in ("StopIteration", "StopAsyncIteration"):
        # It would end a loop of the host: all(map(function, cases)) would be true. Generators do the same (PEP 479).
        name, text = "RuntimeError", f"generated code raised {name}"
    kind = _BUILTIN_ERRORS.get(name)
    if kind is None:
        return GeneratedCodeError(f"generated code raised {name[:60]}: {text[:200]}", do="Treat it as failed.")
    if issubclass(kind, UnicodeError) and kind is not UnicodeError:
        error = _unicode_error(kind, text)
    else:
        error = kind(text)
    error.add_note("raised by generated code in its sandbox")
    return error


def _printable(text: str) -> str:
    """The text without lone surrogates, which would break whatever log it is written to."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unicode_error(kind: type[UnicodeError], text: str) -> Exception:
    """These take five arguments; the text goes where the reason is."""
    if issubclass(kind, UnicodeDecodeError):
        return kind("unknown", b"", 0, 1, text)
    if issubclass(kind, UnicodeEncodeError):
        return kind("unknown", "", 0, 1, text)
    return kind("", 0, 1, text)
