"""Reading the header of a GGUF file that nothing is known about: every number is checked before it is used.

Needs the standard library alone, and imports nothing of this package, so that it can run as a script in a child
process with limits on time and memory (:func:`unsloth.models.gguf.inspect`). The format is described in ggml's
``docs/gguf.md``: magic, version, number of tensors, number of metadata entries, the entries, the tensors' names,
shapes, types and offsets, padding, data.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Far above any real file, far below what could exhaust a machine.
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 20
_MOST_ITEMS = 1 << 24
_LONGEST_KEY = 1 << 16
_LONGEST_NAME = 1 << 10
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 16
_LONGEST_HEADER = 1 << 27  # bytes
_MOST_MEMORY = 450 << 20  # bytes, of the child process
_MOST_SECONDS = 5

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}

# Elements and bytes of a block of each tensor type that files have, by its number in ggml.h.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
}


class GgufFormatError(ValueError):
    """The bytes are not a GGUF file that could be true."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file.

    Attributes:
        name: In the file.
        shape: As in torch, the longest stride first; ggml's own order is the reverse.
        type: Number of the type in ggml.h.
        offset: Of the first byte, from the file's beginning.
        size: In bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What stands before the data.

    Attributes:
        version: Of the format.
        metadata: Values by key; arrays are lists.
        tensors: In the file's order.
        data_offset: Where the data begins.
    """

    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    data_offset: int = 0


class _Source:
    """The file's bytes, read forwards, never past their end."""

    def __init__(self, content: mmap.mmap | bytes) -> None:
        self.content, self.size, self.place = content, len(content), 0
        self.end = "it ends in the middle of its header"

    def take(self, count: int) -> bytes:
        begin, self.place = self.place, self.place + count
        if self.place > self.size:
            raise GgufFormatError(self.end)
        return self.content[begin : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, longest: int, what: str) -> str:
        length = int.from_bytes(self.take(8), "little")
        if length > longest:
            raise GgufFormatError(f"{what} is said to have {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise GgufFormatError(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            found = self.number(_SCALARS[kind])
            return bool(found) if kind == 7 else found
        if kind == _STRING:
            return self.string(self.size, f"the value of {key!r}")
        if kind != _ARRAY:
            raise GgufFormatError(f"the value of {key!r} has the unknown type {kind}")
        return self._array(key)

    def _array(self, key: str) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        width = struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 8
        if count > _MOST_ITEMS or count * width > self.size - self.place:
            raise GgufFormatError(f"the array {key!r} is said to have {count:,} items, more than the file can hold")
        if kind in _SCALARS:
            values = struct.unpack(f"<{count}{_SCALARS[kind][1]}", self.take(count * width))
            return [bool(value) for value in values] if kind == 7 else list(values)
        if kind != _STRING:
            raise GgufFormatError(f"the array {key!r} has items of the unknown type {kind}")
        what = f"an item of {key!r}"
        return [self.string(self.size, what) for _ in range(count)]


def read(path: str | Path) -> Header:
    """The header of a GGUF file, checked against the file's size.

    Raises:
        GgufFormatError: Says what cannot be true.
        OSError: The file cannot be read.
    """
    size = Path(path).stat().st_size
    if size == 0:
        raise GgufFormatError("it is empty")
    mapped = min(size, _LONGEST_HEADER)
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), mapped, access=mmap.ACCESS_READ) as content:
        source = _Source(content)
        if mapped < size:
            source.end = f"its header has more than {mapped:,} bytes"
        if source.take(4) != MAGIC:
            raise GgufFormatError("it does not begin with GGUF")
        version = source.number("<I")
        if version not in (2, 3):
            raise GgufFormatError(f"it has the unknown version {version}, or another order of bytes")
        tensors, entries = source.number("<Q"), source.number("<Q")
        if entries > _MOST_ENTRIES or tensors > _MOST_TENSORS:
            raise GgufFormatError(f"it is said to have {entries:,} metadata entries and {tensors:,} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = source.string(_LONGEST_KEY, "a metadata key")
            if key in metadata:
                raise GgufFormatError(f"the metadata key {key!r} stands there twice")
            metadata[key] = source.value(source.number("<I"), key)
        infos = [_tensor_info(source) for _ in range(tensors)]
        alignment = _alignment(metadata)
        data_offset = -(-source.place // alignment) * alignment
    placed = [TensorInfo(i.name, i.shape, i.type, data_offset + i.offset, i.size) for i in infos]
    _check_places(placed, alignment, size)
    return Header(version, metadata, tuple(placed), data_offset)


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise GgufFormatError(f"its alignment of {alignment!r} bytes is not a power of two up to {_LARGEST_ALIGNMENT}")
    return alignment


def _tensor_info(source: _Source) -> TensorInfo:
    """A tensor's entry; its offset still counts from the beginning of the data."""
    name = source.string(_LONGEST_NAME, "a tensor's name")
    dimensions = source.number("<I")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise GgufFormatError(f"the tensor {name!r} is said to have {dimensions:,} dimensions")
    shape = tuple(source.number("<Q") for _ in range(dimensions))
    kind, offset = source.number("<I"), source.number("<Q")
    if kind not in BLOCKS:
        raise GgufFormatError(f"the tensor {name!r} has the unknown type {kind}")
    if 0 in shape:
        raise GgufFormatError(f"the tensor {name!r} is empty")
    elements, block_bytes = BLOCKS[kind]
    if shape[0] % elements:
        raise GgufFormatError(f"the tensor {name!r} has rows of {shape[0]:,}, not a multiple of {elements}")
    size = shape[0] // elements * block_bytes
    for length in shape[1:]:
        size *= length
    return TensorInfo(name, shape[::-1], kind, offset, size)


def _check_places(tensors: list[TensorInfo], alignment: int, file_size: int) -> None:
    names = set()
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise GgufFormatError(f"the tensor {tensor.name!r} stands there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise GgufFormatError(f"the data of {tensor.name!r} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise GgufFormatError(f"the data of {tensor.name!r} overlaps another tensor's")
        end = tensor.offset + tensor.size
        if end > file_size:
            raise GgufFormatError(f"it ends before the data of {tensor.name!r}")


def _limit_this_process() -> None:
    """Let the operating system end this process before it can trouble the machine."""
    try:
        import resource
    except ImportError:  # not on Windows; the parent process still counts the seconds
        return
    for limit, value in ((resource.RLIMIT_AS, _MOST_MEMORY), (resource.RLIMIT_CPU, _MOST_SECONDS)):
        resource.setrlimit(limit, (value, value))


def _main(path: str) -> None:
    """Print what was found as JSON, or what is wrong; the parent process reads it."""
    _limit_this_process()
    try:
        header = read(path)
    except (GgufFormatError, OSError, MemoryError) as error:
        answer: dict[str, Any] = {"wrong": str(error) or "reading it takes too much memory"}
    else:
        answer = {
            "architecture": header.metadata.get("general.architecture"),
            "tensors": len(header.tensors),
            "types": sorted({tensor.type for tensor in header.tensors}),
        }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main(sys.argv[1])
