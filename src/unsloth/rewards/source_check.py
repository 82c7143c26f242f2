"""What generated source imports, names and defines, read from its syntax tree. Nothing is executed.

This is a filter that tells a model early and cheaply what it may not do. It is not the boundary: that is the process
of :mod:`unsloth.rewards.sandbox`.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unsloth.core.errors import ConfigError, GeneratedCodeError, RefusedImportError, RefusedNameError

MAX_CHARACTERS = 1 << 16

# Modules without effects outside the process; imported before the process loses its files.
AVAILABLE = frozenset(
    """__future__ abc array ast base64 binascii bisect calendar cmath collections contextlib copy dataclasses datetime
    decimal difflib enum fractions functools graphlib hashlib heapq io itertools json keyword math numbers operator
    pprint queue random re statistics string struct sys textwrap time types typing unicodedata warnings weakref
    zlib""".split()
)
# What these import only when used.
_LATER = {"datetime": ("_strptime",), "time": ("_strptime",), "functools": ("typing",)}

_MAKES_IMPORTS = frozenset({"__import__", "exec", "eval", "compile", "import_module", "importlib", "__builtins__"})


@dataclass(frozen=True)
class Imports:
    """Modules that a source names: of Python itself, others, relative ones, and ways to import by computed name."""

    standard: tuple[str, ...]
    foreign: tuple[str, ...]
    relative: tuple[str, ...]
    dynamic: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every absolute name, with dots."""
        return self.standard + self.foreign


def check_python_modules(source: str) -> tuple[bool, dict[str, Any]]:
    """Whether generated source imports nothing but Python's own modules.

    Args:
        source: Python source, such as one function.

    Returns:
        ``(ok, info)``. ``ok`` is True if every import, at any depth, names a module of the standard library. Imports
        by computed name (``__import__``, ``importlib``, ``exec``, ``eval``, ``compile``) cannot be checked and count
        as not ok. ``info`` has the lists ``"stdlib"``, ``"non_stdlib"``, ``"relative_imports"`` and ``"dynamic"``,
        or, if the source is no Python, only ``"error"``.
    """
    try:
        found = imports(parse(source))
    except (SyntaxError, GeneratedCodeError) as error:
        return False, {"error": f"{type(error).__name__}: {error}"}
    info = {
        "stdlib": list(found.standard),
        "non_stdlib": list(found.foreign),
        "relative_imports": list(found.relative),
        "dynamic": list(found.dynamic),
    }
    return not (found.foreign or found.relative or found.dynamic), info


def parse(source: str) -> ast.Module:
    """The syntax tree.

    Raises:
        ConfigError: ``source`` is not a string.
        SyntaxError: It is not Python.
        GeneratedCodeError: It is too long or nested too deeply to be looked at.
    """
    if not isinstance(source, str):
        raise ConfigError("generated source must be a string", got=source, do="Pass the text of the function.")
    if len(source) > MAX_CHARACTERS:
        raise GeneratedCodeError(
            f"generated source of {len(source):,} characters", do=f"At most {MAX_CHARACTERS:,} are accepted."
        )
    try:
        return ast.parse(source)
    except ValueError as error:  # null characters, lone surrogates
        raise SyntaxError(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise GeneratedCodeError("generated source is nested too deeply", do="Treat it as failed.") from error


def imports(tree: ast.Module) -> Imports:
    """Every import in the tree."""
    names: dict[str, None] = {}
    relative: dict[str, None] = {}
    dynamic: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative["." * node.level + (node.module or "")] = None
        elif isinstance(node, ast.ImportFrom):
            names[node.module or ""] = None
        elif isinstance(node, ast.Name) and node.id in _MAKES_IMPORTS:
            dynamic[node.id] = None
        elif isinstance(node, ast.Attribute) and node.attr in ("import_module", "__import__"):
            dynamic[node.attr] = None
    if any(name.partition(".")[0] == "importlib" for name in names):
        dynamic["importlib"] = None
    standard = tuple(name for name in names if name.partition(".")[0] in sys.stdlib_module_names)
    foreign = tuple(name for name in names if name not in standard)
    return Imports(standard, foreign, tuple(relative), tuple(dynamic))


def to_import_first(tree: ast.Module) -> list[str]:
    """Modules to import before the process is locked down: those named that are :data:`AVAILABLE`."""
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module] = None
            names.update(dict.fromkeys(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isascii():
            names["unicodedata"] = None  # the compiler needs it for "\\N{...}"
    wanted = [name for name in names if name.partition(".")[0] in AVAILABLE]
    return wanted + [later for name in wanted for later in _LATER.get(name, ())]


def entry(tree: ast.Module, name: str | None = None) -> str:
    """The function to call: ``name``, else the first at the top level that no other function there uses.

    Raises:
        GeneratedCodeError: There is none.
    """
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name is not None:
        return name  # whether it is a function shows when it has been defined
    if not functions:
        raise GeneratedCodeError("generated source defines no function", do="Treat it as failed.")
    used = {
        node.id
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id != function.name
    }
    return next((function.name for function in functions if function.name not in used), functions[0].name)


def refuse_globals(source: str, tree: ast.Module) -> None:
    """Raise unless the source is functions only, which use nothing but each other and Python's builtins.

    Raises:
        RefusedNameError: There is another statement at the top level, a ``global`` one, or an unknown name.
        RefusedImportError: A module is imported at the top level, or one that is not :data:`AVAILABLE`.
    """
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            raise RefusedImportError(
                f"line {node.lineno} imports at the top level", do="Generated code has to import inside its function."
            )
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (isinstance(node, ast.FunctionDef) or is_text):
            raise RefusedNameError(
                f"line {node.lineno} is at the top level and not a function",
                do="Generated code may have no globals; everything belongs inside its function.",
            )
    refuse_modules(imports(tree))
    known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | set(dir(builtins))
    try:
        table = symtable.symtable(source, "<generated>", "exec")
    except RecursionError as error:
        raise GeneratedCodeError("generated source is nested too deeply", do="Treat it as failed.") from error
    for name, declared in _globals(table):
        if declared or name not in known:
            raise RefusedNameError(
                f"global name {name!r}", do="Generated code may use only its arguments, its own names and builtins."
            )


def refuse_modules(found: Imports) -> None:
    """Raise :class:`RefusedImportError` if a module is imported that the sandbox does not have."""
    for name in (*found.relative, *found.modules):
        if name.partition(".")[0] not in AVAILABLE:
            raise RefusedImportError(
                f"module {name!r} is not available to generated code",
                do="It has the modules of unsloth.rewards.AVAILABLE.",
            )


def _globals(table: symtable.SymbolTable) -> Iterator[tuple[str, bool]]:
    """Names that functions look up as globals, and whether a ``global`` statement says so."""
    waiting = list(table.get_children())
    while waiting:
        inner = waiting.pop()
        waiting.extend(inner.get_children())
        for symbol in inner.get_symbols():
            if symbol.is_global() and (symbol.is_declared_global() or not symbol.get_name().startswith("__")):
                yield symbol.get_name(), symbol.is_declared_global()
