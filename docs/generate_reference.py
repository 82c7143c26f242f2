"""Write docs/reference.md from the docstrings: python docs/generate_reference.py"""

import inspect
from pathlib import Path

import unsloth

HEADER = """# Reference

Every public name of `unsloth`, from the docstrings. Written by `docs/generate_reference.py`; a test compares the two.
"""


def main() -> None:
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole page; names of one object are listed together."""
    objects: dict[int, tuple[object, list[str]]] = {}
    for name in sorted(unsloth.__all__):
        value = getattr(unsloth, name)
        if callable(value):
            objects.setdefault(id(value), (value, []))[1].append(name)
    return "\n".join([HEADER, *(section(value, names) for value, names in objects.values())])


def section(value: object, names: list[str]) -> str:
    lines = [f"## {', '.join(names)}", ""]
    if inspect.isclass(value):
        lines += [docstring(value), ""]
        for method_name, method in inspect.getmembers(value, inspect.isroutine):
            own = any(method_name in vars(base) for base in value.__mro__ if base.__module__.startswith("unsloth"))
            if own and not method_name.startswith("_") and not issubclass(value, BaseException):
                lines += [f"### {names[0]}.{method_name}", "", signature(method_name, method), docstring(method), ""]
    else:
        lines += [signature(names[0], value), docstring(value), ""]
    return "\n".join(lines)


def signature(name: str, value: object) -> str:
    parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    shown = [
        f"{'*' if p.kind is p.VAR_POSITIONAL else '**' if p.kind is p.VAR_KEYWORD else ''}{p.name}"
        + ("" if p.default is p.empty else f"={p.default!r}")
        for p in parameters
    ]
    joined = ", ".join(shown)
    body = f"{name}({joined})" if len(joined) < 90 else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"
    return f"```text\n{body}\n```\n"


def docstring(value: object) -> str:
    text = inspect.getdoc(value)
    assert text, f"{value} has no docstring"
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    main()
