"""Writing safetensors files of a limited size, without holding more than one tensor.

A safetensors file is 8 bytes with the length of a JSON header, the header (dtype, shape and place of each tensor), and
the tensors' bytes. All of that is known before the first value is, so each tensor is written to its place as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from unsloth.core.errors import ConfigError, ExportError
from unsloth.export.layout import Planned
from unsloth.models.weight_files import INDEX, SINGLE

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_METADATA = {"format": "pt"}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` (10^9 bytes each) or ``"500MiB"``.

    Raises:
        ConfigError: Not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size).upper())
    value = int(float(found[1]) * _UNITS[found[2]]) if found and not isinstance(size, bool) else 0
    if value <= 0:
        raise ConfigError("max_shard_size is a number of bytes", got=size, do='Write it as "5GB" or "500MB".')
    return value


def names_of(count: int) -> list[str]:
    """The names that transformers gives the weight files of a model with ``count`` of them."""
    if count == 1:
        return [SINGLE]
    stem = SINGLE.removesuffix(".safetensors")
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split(planned: Sequence[Planned], max_shard_size: int) -> list[list[Planned]]:
    """Divide tensors, in their order, into files of at most ``max_shard_size`` bytes (or one larger tensor)."""
    files: list[list[Planned]] = []
    size = 0
    for tensor in planned:
        if not files or size + tensor.nbytes > max_shard_size:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def write(
    folder: Path, planned: Sequence[Planned], tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int
) -> None:
    """Write tensors to weight files in ``folder`` while they are made, with an index if there are several files.

    Args:
        folder: An existing folder.
        planned: All tensors, in any order.
        tensors: Their values, contiguous on the CPU, in any order; none is kept.
        max_shard_size: Largest weight file in bytes.

    Raises:
        ExportError: A tensor that was not planned, has another shape or dtype, or is missing.
    """
    groups = split(planned, max_shard_size)
    places: dict[str, tuple[BinaryIO, int, Planned]] = {}
    files: list[BinaryIO] = []
    try:
        for name, group in zip(names_of(len(groups)), groups, strict=True):
            files.append((folder / name).open("wb"))
            places.update(_begin(files[-1], group))
        for name, tensor in tensors:
            file, offset, expected = _expected(places, name, tensor)
            file.seek(offset)
            if expected.nbytes:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy())
            del places[name]
    finally:
        for file in files:
            file.close()
    if places:
        raise ExportError("the model did not give all tensors of its checkpoint", got=", ".join(list(places)[:3]))
    _write_index(folder, [[tensor.name for tensor in group] for group in groups], sum(p.nbytes for p in planned))


def write_held(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int) -> None:
    """As :func:`write` for tensors whose sizes are not known before; those of one file are held at a time."""
    groups: list[list[str]] = []
    for held in _gathered(tensors, max_shard_size):
        safetensors.torch.save_file(held, folder / f"part-{len(groups)}", metadata=_METADATA)
        groups.append(list(held))
    for number, name in enumerate(names_of(len(groups))):
        (folder / f"part-{number}").rename(folder / name)
    size = sum((folder / name).stat().st_size for name in names_of(len(groups)))
    _write_index(folder, groups, size)


def _gathered(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            yield held
            held, size = {}, 0
        held[name] = tensor
        size += tensor.nbytes
    yield held


def _begin(file: BinaryIO, group: Sequence[Planned]) -> dict[str, tuple[BinaryIO, int, Planned]]:
    """Write a file's header and give it its full size; return where each tensor goes."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    starts = []
    group = sorted(group, key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned
    for tensor in group:
        starts.append(end)
        end += tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    first = file.tell()
    file.truncate(first + end)
    return {tensor.name: (file, first + start, tensor) for tensor, start in zip(group, starts, strict=True)}


def _expected(
    places: dict[str, tuple[BinaryIO, int, Planned]], name: str, tensor: torch.Tensor
) -> tuple[BinaryIO, int, Planned]:
    if name not in places:
        raise ExportError("the model gave a tensor that its checkpoint does not have, or twice", got=name)
    planned = places[name][2]
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise ExportError(
            f"the model gave {name} as {tensor.dtype} {list(tensor.shape)}, where its checkpoint has "
            f"{planned.dtype} {list(planned.shape)}"
        )
    return places[name]


def _write_index(folder: Path, groups: Sequence[Sequence[str]], size: int) -> None:
    if len(groups) == 1:
        return
    weight_map = {tensor: file for file, group in zip(names_of(len(groups)), groups, strict=True) for tensor in group}
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
