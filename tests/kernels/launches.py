"""Launches that Triton's interpreter ran, read once more by Triton's compiler, with the types that they were given.

The interpreter takes Python's rules for numbers: an argument may be an integer in one launch and a float in the next,
and a variable may change its type. The compiler refuses such kernels, on the GPU, at the first launch. So every kernel
notes the types of its launches while it is interpreted, and each combination goes through the compiler's front end,
which needs no GPU: ``launches.py FILE`` in a process of its own, since TRITON_INTERPRET=1 breaks compilation.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import mangle_type

import unsloth.kernels

_MOST = 24  # combinations of types and constants a kernel
_ON_GPU = {"UPCAST": False, "INTERPRET": False, "PLAIN": False, "TOGETHER": True}  # what the interpreter has otherwise


def kernels() -> dict[tuple[str, str], Any]:
    """Every kernel of the package by its module's name and its own."""
    found = {}
    for info in pkgutil.iter_modules(unsloth.kernels.__path__):
        module = importlib.import_module(f"unsloth.kernels.{info.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and getattr(getattr(value, "fn", None), "__module__", "") == module.__name__:
                found[info.name, name] = value
    return found


class Recorder:
    """Notes the types of every launch of every kernel from now on."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], dict[tuple, dict[str, Any]]] = {}
        for key, kernel in kernels().items():
            self.seen[key] = {}
            kernel.add_pre_run_hook(self._hook(kernel.fn, self.seen[key]))

    @staticmethod
    def _hook(fn: Any, seen: dict[tuple, dict[str, Any]]) -> Any:
        constants = [name for name, kind in inspect.get_annotations(fn).items() if "constexpr" in str(kind)]

        def note(*args: Any, **kwargs: Any) -> None:
            given = inspect.getcallargs(fn, *args, **kwargs)
            types: dict[str, Any] = {}
            for name, value in given.items():
                if name in constants:
                    types[name] = ("constant", _ON_GPU.get(name, value))
                elif value is None or isinstance(value, tuple):
                    return  # a launch of its own kind
                else:
                    types[name] = ("one" if type(value) is int and value == 1 else "argument", mangle_type(value))
            if not any("fp64" in str(kind) for _, kind in types.values()):  # float64 runs in the interpreter alone
                key = tuple(str(kind) for kind in types.values())
                if key in seen or len(seen) < _MOST:
                    seen[key] = types

        return note

    def problems(self) -> str:
        """What the compiler's front end refuses, by a process of its own; "" where it takes everything."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "launches.pickle"
            path.write_bytes(pickle.dumps([(key, types) for key, seen in self.seen.items() for types in seen.values()]))
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, __file__, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stdout + done.stderr[-4000:]


def check(kernel: Any, types: dict[str, tuple[str, Any]]) -> None:
    """The compiler's front end, for one launch."""
    constants, signature = {}, {}
    for index, (parameter, (kind, value)) in enumerate(zip(kernel.params, types.values(), strict=True)):
        fixed = kind == "constant" or (kind == "one" and not parameter.do_not_specialize)
        signature[parameter.name] = "constexpr" if fixed else value
        if fixed:
            constants[(index,)] = value if kind == "constant" else 1
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options, context = backend.parse_options({}), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, functions = ASTSource(kernel, signature, constants, {}), backend.get_codegen_implementation(options)
    source.make_ir(target, options, functions, backend.get_module_map(), context)


def main(path: str) -> int:
    """Check what was noted; returns the number of launches refused."""
    known, refused = kernels(), 0
    for key, types in pickle.loads(Path(path).read_bytes()):
        try:
            check(known[key], types)
        except triton.TritonError as error:
            refused += 1
            sys.stdout.write(f"{'.'.join(key)} of {types}: {error}\n")
    return refused


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) != 0)
