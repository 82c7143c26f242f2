"""One generated function without globals, in a sandbox."""

from __future__ import annotations

from unsloth.rewards.sandbox import SandboxConfig, SandboxedFunction
from unsloth.rewards.source_check import parse, refuse_globals


def create_locked_down_function(source: str, *, config: SandboxConfig | None = None) -> SandboxedFunction:
    """Turn generated source into a function that can be called safely.

    First a look at the syntax tree: the source must be functions only, which use nothing but their arguments, their
    own names, each other, builtins, and harmless modules imported inside (``unsloth.rewards.AVAILABLE``). If there are
    several, the first that no other one uses is meant. Then the function is defined in a process of its own, which
    has no files, network, environment, other processes, threads or descriptors, and limits of memory, time and
    output; the returned object sends each call there. It needs no ``with``: the process ends with the object.

    The expected answer never goes there; compare the returned plain values in the host. Not covered, and the levels
    of the boundary: :mod:`unsloth.rewards.sandbox`.

    Args:
        source: Python source of the function.
        config: Limits and level; 5 seconds and 512 MiB by default.

    Returns:
        A callable. Exceptions of the generated code arrive as their builtin types; running too long is a
        ``TimeoutError``. ``.run(...)`` returns the status, printed text and time instead of raising.

    Raises:
        SyntaxError: The source is not Python.
        RefusedNameError: It uses or defines globals (a ``NameError``).
        RefusedImportError: It imports what it may not, or at the top level (an ``ImportError``).
        GeneratedCodeError: It defines no function.
        SandboxTimeoutError, SandboxKilledError: Defining it took too long, or ended the process.
        SandboxUnavailableError: This machine cannot give the boundary; the message says which part and why.
    """
    refuse_globals(source, parse(source))
    return SandboxedFunction(source, config=config)
