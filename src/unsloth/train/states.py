"""States of optimizers, schedules and random generators as JSON and safetensors, without pickle.

``NAME.json`` holds the structure, with every tensor replaced by the name under which ``NAME.safetensors`` holds it.
What JSON cannot tell apart (tuples, mappings with numbers as keys) is tagged. Numbers come back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from unsloth.core.errors import TrainingError

_TENSOR, _TUPLE, _MAPPING, _ARRAY = "$tensor", "$tuple", "$mapping", "$array"


def write(value: Any, folder: Path, name: str) -> None:
    """Write a state as ``name.json`` and, if it has tensors, ``name.safetensors``.

    Args:
        value: Nested mappings, lists and tuples of numbers, text, None, NumPy arrays and tensors (of any dtype and
            device). A tensor that occurs several times is stored once.
        folder: An existing folder.
        name: Name of the files, without a suffix.

    Raises:
        TrainingError: The state holds something else, which only pickle could store.
    """
    encoder = _Encoder(name)
    structure = encoder.encode(value, name)
    if encoder.tensors:
        safetensors.torch.save_file(encoder.tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(structure))


def read(folder: Path, name: str) -> Any:
    """The state that :func:`write` wrote, with its tensors on the CPU."""
    path = folder / f"{name}.safetensors"
    tensors = safetensors.torch.load_file(path) if path.is_file() else {}
    return _decode(json.loads((folder / f"{name}.json").read_text()), tensors)


def size(value: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size(part) for part in value.values())
    return sum(size(part) for part in value) if isinstance(value, list | tuple) else 0


class _Encoder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._alive: list[torch.Tensor] = []  # so that no address is used twice while we encode

    def encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, torch.Tensor):
            return {_TENSOR: self._store(value.detach(), path)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            return {_ARRAY: [value.dtype.str, value.tolist()]}
        if isinstance(value, tuple):
            return {_TUPLE: [self.encode(part, f"{path}.{i}") for i, part in enumerate(value)]}
        if isinstance(value, list):
            return [self.encode(part, f"{path}.{i}") for i, part in enumerate(value)]
        if isinstance(value, Mapping):
            parts = [[self._key(key, path), self.encode(part, f"{path}.{key}")] for key, part in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in parts)
            return dict(parts) if plain else {_MAPPING: parts}
        raise self._unstorable(path, value)

    def _key(self, key: Any, path: str) -> str | int:
        if isinstance(key, str | int):
            return key
        raise self._unstorable(path, key)

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        # safetensors refuses tensors that share memory, such as the one code book of all 8-bit states
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or identity not in self._stored:
            self._stored[identity] = path
            self._alive.append(tensor)
            self.tensors[path] = tensor.to("cpu", copy=True).contiguous()
        return self._stored[identity]

    def _unstorable(self, path: str, value: Any) -> TrainingError:
        return TrainingError(
            f"the state of the {self.name} cannot be stored without pickle: {path} is a {type(value).__name__}",
            do="Choose another optimizer or schedule, or save_only_model=True.",
        )


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _ARRAY in value:
        kind, numbers = value[_ARRAY]
        return np.array(numbers, dtype=kind)
    if _TUPLE in value:
        return tuple(_decode(part, tensors) for part in value[_TUPLE])
    if _MAPPING in value:
        return {key: _decode(part, tensors) for key, part in value[_MAPPING]}
    return {key: _decode(part, tensors) for key, part in value.items()}
