"""Reward functions by name, for runs that are described by a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unsloth import rewards
from unsloth.core.errors import ConfigError

_FORMS = 'Use a name such as "correctness", "module:function" or "file.py:function".'


def find(entry: str | Mapping[str, Any]) -> Callable[..., Any]:
    """The reward function that an entry of a list names.

    Args:
        entry: Either a name of :mod:`unsloth.rewards` that makes a reward function, such as ``"correctness"``; or
            ``"module:function"``; or ``"file.py:function"``, the file relative to the folder one is in, whose code
            is run. A mapping has such a ``name``, and the arguments that the function is made with, such as
            ``{"name": "length", "maximum": 200}``; without arguments, a function of one's own is taken as it is.

    Raises:
        ConfigError: There is no such function, or it cannot be made with these arguments.
    """
    options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = options.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError("a reward function has no name", got=entry, do=_FORMS)
    place, colon, attribute = name.rpartition(":")
    if not colon:
        return _made(name, _of_library(name), options)
    function = getattr(_module(place, name), attribute, None)
    if not callable(function):
        raise ConfigError("there is no such reward function", got=name, do=f"{place} must define {attribute}.")
    return _made(name, function, options) if options else function


def _of_library(name: str) -> Callable[..., Any]:
    if name not in rewards.__all__:
        near = difflib.get_close_matches(name, rewards.__all__, 1)
        raise ConfigError("unknown reward function", got=name, do=f"Did you mean {near[0]}?" if near else _FORMS)
    found: Callable[..., Any] = getattr(rewards, name)
    return found


def _made(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        inspect.signature(factory).bind(**options)
        made = factory(**options)
    except TypeError as error:
        raise ConfigError(
            f"the reward {name} cannot be made: {error}", got=dict(options), do="Give its arguments beside the name."
        ) from error
    if not callable(made):
        raise ConfigError("this name makes no reward function", got=name, do=_FORMS)
    return made


def _module(place: str, name: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ConfigError(f"the module {place} cannot be imported: {error}", got=name, do=_FORMS) from error
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError("no such file with reward functions", got=place, do="Paths start at the folder you are in.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        raise ConfigError(f"{place} cannot be run: {type(error).__name__}: {error}", got=name) from error
    return module
