"""Writing and reading GGUF files, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
from gguf import GGMLQuantizationType as Type

from unsloth.core.errors import ExportError
from unsloth.models import gguf_header

_NUMPY: dict[Type, Any] = {Type.F32: "<f4", Type.F16: "<f2"}
_TORCH = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: In the file.
        shape: As in torch.
        type: In the file.
    """

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        elements, block = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // elements * block


class Writer:
    """A file, or several shards of one, whose tensors may come in any order. A context manager.

    Args:
        path: Of the file; shards get llama.cpp's suffix ``-00001-of-00002``.
        architecture: llama.cpp's name.
        metadata: Value and type by key.
        tensors: All that will be written.
        shard_bytes: Largest shard; 0 for one file.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, tuple[Any, GGUFValueType]],
        tensors: Sequence[Planned],
        shard_bytes: int = 0,
    ) -> None:
        self._writer = GGUFWriter(path, architecture, split_max_size=shard_bytes)
        for key, (value, kind) in metadata.items():
            if key != "general.architecture":
                self._writer.add_key_value(key, value, kind)
        for tensor in tensors:
            # The dtype is not looked at where the type in the file is said.
            self._writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type
            )
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self.paths = self._writer.format_shard_names(path)
        assert self._writer.fout is not None
        self._files = self._writer.fout
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._places = self._plan_places()
        self._missing = set(self._planned)

    def _plan_places(self) -> dict[str, tuple[int, int]]:
        """File and offset of each tensor."""
        places = {}
        for number, (file, tensors) in enumerate(zip(self._files, self._writer.tensors, strict=True)):
            alignment = self._writer.data_alignment
            offset = GGUFWriter.ggml_pad(file.tell(), alignment)
            for name in tensors:
                places[name] = (number, offset)
                offset = GGUFWriter.ggml_pad(offset + self._planned[name].size, alignment)
            file.truncate(offset)
        return places

    def put(self, name: str, data: np.ndarray) -> None:
        """Write one tensor's bytes; ``data`` is contiguous, and of any dtype."""
        if data.nbytes != self._planned[name].size:
            raise ExportError(
                f"the tensor {name} has {data.nbytes:,} bytes instead of {self._planned[name].size:,}",
                do="Please report this with the model's name.",
            )
        number, offset = self._places[name]
        self._files[number].seek(offset)
        self._files[number].write(data.reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None and self._missing:
            raise ExportError("a tensor was planned and not written", got=sorted(self._missing)[0])


def as_bytes(tensor: torch.Tensor, kind: Type) -> np.ndarray:
    """A float tensor in one of the three unquantized types, as contiguous numpy (bfloat16 as raw 16 bits)."""
    dtype = next(dtype for dtype, other in _TORCH.items() if other is kind)
    converted = tensor.to(dtype).contiguous()
    return (converted.view(torch.int16) if kind is Type.BF16 else converted).numpy()


class Reader:
    """The tensors of a file that this library wrote, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = gguf_header.read(path)
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)

    def raw(self, tensor: gguf_header.TensorInfo) -> np.ndarray:
        """A tensor's bytes."""
        return self._bytes[tensor.offset : tensor.offset + tensor.size]

    def float32(self, tensor: gguf_header.TensorInfo) -> np.ndarray:
        """An unquantized tensor in float32, [rows, columns] or in its own shape."""
        kind = Type(tensor.type)
        if kind is Type.BF16:
            wide = self.raw(tensor).view("<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(tensor.shape)
        return self.raw(tensor).view(_NUMPY[kind]).astype(np.float32).reshape(tensor.shape)

    def __iter__(self) -> Iterator[gguf_header.TensorInfo]:
        return iter(self.header.tensors)
