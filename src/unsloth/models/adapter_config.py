"""A saved adapter's ``adapter_config.json``: checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from unsloth.core.errors import AdapterError
from unsloth.models import weight_files

NAME = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Keys that make PEFT import a module which the file names.
_RUNS_CODE = ("megatron_config",)
_BASE = "base_model_name_or_path"


def check(folder: Path, *, is_local: bool = True, weights: bool = True) -> str:
    """Check an adapter folder's configuration and weight file; return the name of its base model.

    Args:
        folder: The adapter.
        is_local: Whether it was made on this machine, so that its base may be a folder here.
        weights: Whether to check its weight file too.

    Raises:
        AdapterError: A value that cannot be right, or a setting that the installed PEFT does not know.
        CheckpointError: The weights are missing, damaged or pickled.
    """
    path = folder / NAME
    config = weight_files.read_json(path)
    if weights and (folder / "adapter_model.bin").is_file() and not (folder / WEIGHTS).is_file():
        raise weight_files.pickled(folder)
    if weights:
        weight_files.check_file(folder / WEIGHTS)
    _check_known(path, config)
    for key, (valid, expected) in _VALID.items():
        if key in config and not valid(config[key]):
            raise AdapterError(f"{key} in {path} must be {expected}", got=config[key], do="Train or copy it again.")
    return _base(path, config, is_local)


def _base(path: Path, config: Mapping[str, Any], is_local: bool) -> str:
    base = config.get(_BASE)
    if not base or not isinstance(base, str):
        raise AdapterError(
            "the adapter does not say which model it was trained on",
            got=path,
            do=f'Set "{_BASE}" in that file.',
        )
    looks_like_a_path = base.startswith((".", "/", "~")) or "\\" in base or ".." in Path(base).parts
    if looks_like_a_path and not (is_local and Path(base).expanduser().is_dir()):
        raise AdapterError(
            f"the adapter was trained on a model in a folder that is not here ({path})",
            got=base,
            do=f'Set "{_BASE}" in that file to the hub id of the model, or to its folder on this machine.',
        )
    return base


def _check_known(path: Path, config: Mapping[str, Any]) -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if config_class is None:
        raise AdapterError(f"peft_type in {path} is not one that PEFT knows", got=kind, do="Upgrade peft.")
    known = {field.name for field in fields(config_class)} | {"peft_version"}
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        raise AdapterError(
            f"{path} has settings that the installed PEFT does not know, and would ignore",
            got=", ".join(unknown),
            do="Upgrade peft, or remove them if the adapter works without.",
        )
    dangerous = [key for key in _RUNS_CODE if config.get(key)]
    if dangerous:
        raise AdapterError(
            f"{path} asks for a module to be imported, which is not done",
            got=", ".join(dangerous),
            do="Remove that setting if you trust the adapter.",
        )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _values(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(valid, value.values())))


_VALID: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (_is_scale, "a positive number"),
    "lora_dropout": (_is_share, "at least 0 and below 1"),
    "rank_pattern": (_values(_is_rank), "a table of positive whole numbers"),
    "alpha_pattern": (_values(_is_scale), "a table of positive numbers"),
}
