"""Compile every kernel of the package for one GPU architecture, without a GPU: compile_kernels.py SM DTYPE [MODULE].

Each kernel module offers ``compile_examples(float_dtype)``, where float_dtype is "fp16" or "bf16", returning a list
of ``(kernel, signature, constexprs)`` or ``(kernel, signature, constexprs, options)``: signature maps the names of
the run-time arguments to Triton types ("*bf16", "i32", "fp32"), constexprs the names of the constexpr arguments to
values, options are launch options such as num_warps; "i32:16" is a multiple
of 16, a tuple of types a tuple. Prints one JSON line a compilation, and fails if a
``*_kernel`` of a module has no example (an empty list says that none of them is for this dtype's cards). Runs as a
process of its own, since TRITON_INTERPRET=1 breaks compilation.
"""

import importlib
import json
import pkgutil
import re
import sys
import time

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import unsloth.kernels


def compile_example(target: GPUTarget, kernel, signature: dict, constexprs: dict, options: dict | None = None) -> dict:
    """One compilation; pointers are declared 16-byte aligned, as torch's allocations are.

    Arrays that instructions declare come on top of the compiler's shared memory, which asks for more than 48 KiB in all
    only where its own part is larger than that; a launch of anything else would be refused.
    """
    types: dict = {}
    attrs: dict = {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constexprs else signature[name]
        places = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        for place, one in zip(places, kinds, strict=True):
            if one.startswith("*") or one.endswith(":16"):
                attrs[place] = [["tt.divisibility", 16]]
        plain = tuple(one.removesuffix(":16") for one in kinds)
        types[name] = plain if isinstance(kind, tuple) else plain[0]
    start = time.perf_counter()
    compiled = triton.compile(ASTSource(kernel, types, constexprs, attrs), target=target, options=options or {})
    declared = sum(int(size) for size in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", compiled.asm["ptx"]))
    if declared and declared + compiled.metadata.shared > 48 * 2**10 >= compiled.metadata.shared:
        raise ValueError(f"{declared} bytes of shared memory declared beside {compiled.metadata.shared}")
    return {
        "kernel": kernel.__name__,
        "seconds": round(time.perf_counter() - start, 2),
        "shared": compiled.metadata.shared,
        "cubin": len(compiled.asm["cubin"]),
    }


def report(row: dict) -> None:
    """One JSON line."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def main(sm: int, float_dtype: str, only: str = "") -> int:
    """Compile all examples of all modules; returns the number of problems."""
    target, problems = GPUTarget("cuda", sm, 32), 0
    for info in pkgutil.iter_modules(unsloth.kernels.__path__):
        if only and info.name != only:
            continue
        module = importlib.import_module(f"unsloth.kernels.{info.name}")
        own = {
            name
            for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__
        }
        examples = module.compile_examples(float_dtype) if hasattr(module, "compile_examples") else []
        for example in examples:
            try:
                row = compile_example(target, *example)
            except (triton.TritonError, RuntimeError, ValueError, TypeError, KeyError) as error:
                row, problems = (
                    {"kernel": example[0].__name__, "error": f"{type(error).__name__}: {error}"},
                    problems + 1,
                )
            report({"module": info.name, "sm": sm, "dtype": float_dtype, **row})
        missing = {n for n in own if n.endswith("_kernel")} - {example[0].__name__ for example in examples}
        elsewhere = hasattr(module, "compile_examples") and not examples  # made for newer cards alone
        if missing and not elsewhere:
            report({"module": info.name, "error": f"no compile example for {sorted(missing)}"})
            problems += 1
    return problems


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], *sys.argv[3:4]) != 0)
