"""Which keys a configuration file may have, and of which type: the fields of the configuration classes.

They are read from the classes' source files instead of from the imported classes, because importing those loads
torch, and a misspelt key should be reported in a fraction of a second.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from unsloth.core.errors import ConfigError


@dataclass(frozen=True)
class ClassSource:
    """Where a class is defined: the package, the file in it, and the class's name."""

    package: str
    file: str
    name: str


@dataclass(frozen=True)
class Key:
    """What a key may hold.

    Attributes:
        kinds: Names of types: bool, int, float, str, list, dict, none; "any" if the annotation says no more.
        choices: The values that a ``Literal`` lists.
    """

    kinds: frozenset[str]
    choices: tuple[Any, ...] = ()


_PLAIN = ClassSource("transformers", "training_args.py", "TrainingArguments")
_TRL = ClassSource("trl", "trainer/base_config.py", "_BaseConfig")
_COMMON = (
    ClassSource("unsloth", "train/follow.py", "FollowsModel"),
    ClassSource("unsloth", "train/survival.py", "SurvivalArguments"),
)
_PREFERENCE = (*_COMMON, ClassSource("unsloth", "train/preference.py", "PreferenceArguments"))
_PAIRED = (_PLAIN, *_PREFERENCE, ClassSource("unsloth", "train/paired.py", "PairedArguments"))
_CPO = (*_PAIRED, ClassSource("unsloth", "train/cpo.py", "CPOConfig"))

TRAINING = {
    "sft": (
        _PLAIN,
        _TRL,
        ClassSource("trl", "trainer/sft_config.py", "SFTConfig"),
        *_COMMON,
        ClassSource("unsloth", "train/row_arguments.py", "RowArguments"),
        ClassSource("unsloth", "train/config.py", "SFTConfig"),
    ),
    "dpo": (_PLAIN, _TRL, ClassSource("trl", "trainer/dpo_config.py", "DPOConfig"), *_PREFERENCE),
    "grpo": (
        _PLAIN,
        _TRL,
        ClassSource("trl", "trainer/grpo_config.py", "GRPOConfig"),
        *_COMMON,
        ClassSource("unsloth", "train/grpo_config.py", "RolloutArguments"),
    ),
    "kto": (
        _PLAIN,
        _TRL,
        ClassSource("trl", "trainer/kto_config.py", "KTOConfig"),
        *_PREFERENCE,
        ClassSource("unsloth", "train/kto.py", "KTOConfig"),
    ),
    "reward": (_PLAIN, _TRL, ClassSource("trl", "trainer/reward_config.py", "RewardConfig"), *_PREFERENCE),
    "orpo": (*_PAIRED, ClassSource("unsloth", "train/orpo.py", "ORPOConfig")),
    "cpo": _CPO,
    "simpo": _CPO,
}
"""The configuration class of each training method and its bases, the most general first."""

_KIND_NAMES = {"bool": "bool", "int": "int", "float": "float", "str": "str", "None": "none"} | {
    "dict": "dict",
    "Mapping": "dict",
    "list": "list",
    "List": "list",
    "tuple": "list",
    "Iterable": "list",
    "Sequence": "list",
}
_SAID = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"} | {
    "list": "a list, such as [a, b]",
    "dict": "a mapping of keys to values",
}
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@cache
def keys_of(*classes: ClassSource) -> dict[str, Key]:
    """The fields of a dataclass by name, given its definition and those of its bases, the most general first.

    Raises:
        ConfigError: A package is not installed, or defines the class elsewhere.
    """
    keys: dict[str, Key] = {}
    for source in classes:
        for statement in _definition(source).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if not _is_excluded(statement):
                    keys[statement.target.id] = _key(statement.annotation)
    return keys


def convert(value: Any, key: Key, where: str) -> Any:
    """``value`` as the type that ``key`` asks for.

    Raises:
        ConfigError: It is of another type; ``where`` names the place in the file.
    """
    kinds = key.kinds
    if isinstance(value, str) and "bool" in kinds and "str" not in kinds and value.lower() in _WORDS:
        value = _WORDS[value.lower()]
    if key.choices and value not in key.choices and not (value is None and "none" in kinds):
        listed = ", ".join(str(choice) for choice in key.choices)
        raise ConfigError(f"{where} must be one of {listed}", got=value)
    if "any" in kinds or _kind(value) in kinds or (_kind(value) == "int" and "float" in kinds):
        return value
    said = [_SAID[kind] for kind in _SAID if kind in kinds and not (kind == "int" and "float" in kinds)]
    said = said or ["null"]
    do = "Put it in quotes to make it text." if kinds <= {"str", "none"} and not isinstance(value, list | dict) else ""
    raise ConfigError(f"{where} must be {' or '.join(said)}", got=value, do=do)


def _kind(value: Any) -> str:
    return {"NoneType": "none", "tuple": "list"}.get(type(value).__name__, type(value).__name__)


def _definition(source: ClassSource) -> ast.ClassDef:
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "a package that training needs is not installed",
            got=source.package,
            do="Install this library again; `unsloth doctor` checks what it needs.",
        )
    path = Path(spec.submodule_search_locations[0]) / source.file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == source.name:
            return statement
    raise ConfigError(
        f"{source.package} does not define {source.name} where it is expected",
        got=path,
        do="This version of it is not supported; `unsloth doctor` shows which are.",
    )


def _is_excluded(statement: ast.AnnAssign) -> bool:
    """Class variables, private fields, and fields that are not arguments."""
    text = ast.unparse(statement.annotation)
    name = statement.target.id if isinstance(statement.target, ast.Name) else ""
    no_argument = isinstance(statement.value, ast.Call) and any(
        keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in statement.value.keywords
    )
    return "ClassVar" in text or name.startswith("_") or no_argument


def _key(annotation: ast.expr) -> Key:
    parts = list(_alternatives(annotation))
    kinds = frozenset(kind for kind, _ in parts)
    if "any" in kinds and "str" in kinds:  # an enumeration, or its member's name
        kinds -= {"any"}
    choices = tuple(value for kind, value in parts if value is not None)
    return Key(kinds, choices if len(choices) == sum(kind != "none" for kind, _ in parts) else ())


def _alternatives(node: ast.expr) -> Iterator[tuple[str, Any]]:
    """The types that an annotation allows, each with its value if it is part of a ``Literal``."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from _alternatives(left)
            yield from _alternatives(right)
        case ast.Constant(value=None):
            yield "none", None
        case ast.Constant(value=str(text)):
            yield from _alternatives(ast.parse(text, mode="eval").body)
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in ("Optional", "Union", "Literal"):
            yield from _listed(name, inner.elts if isinstance(inner, ast.Tuple) else [inner])
        case ast.Subscript(value=generic):
            yield from _alternatives(generic)
        case ast.Name(id=name) if name in _KIND_NAMES:
            yield _KIND_NAMES[name], None
        case _:
            yield "any", None


def _listed(name: str, members: list[ast.expr]) -> Iterator[tuple[str, Any]]:
    """The types in the brackets of ``Optional``, ``Union`` or ``Literal``."""
    if name == "Optional":
        yield "none", None
    for member in members:
        if name == "Literal":
            value = ast.literal_eval(member)
            yield _kind(value), value
        else:
            yield from _alternatives(member)
