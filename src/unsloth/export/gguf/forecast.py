"""What an export as GGUF would write, known without loading weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsloth.core import device
from unsloth.export import dynamic, forecast, predict
from unsloth.export.gguf import convert, importance, methods, save
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Planned
from unsloth.export.gguf.methods import Method


@dataclass(frozen=True)
class File:
    """A file before it is made.

    Attributes:
        method: Name of its quantization method.
        nbytes: Its size in bytes, but for its header; of a dynamic type, the most that it may be.
        replaced: How many tensors have rows that do not take their method's type.
        matrix: Whether an importance matrix will be measured for it, if none is given.
    """

    method: str
    nbytes: int
    replaced: int
    matrix: bool


@dataclass(frozen=True)
class Forecast:
    """An export as GGUF before it is made.

    Attributes:
        files: Those that stay.
        conversion: Bytes of the unquantized file, which is there while they are made.
        free: Free bytes of the file system that the folder will be on.
    """

    files: tuple[File, ...]
    conversion: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether there is room on the disk."""
        return self.conversion + sum(file.nbytes for file in self.files) < self.free


def of_model(
    name: str, folder: str | os.PathLike[str], names: Sequence[str], *, trust_remote_code: bool = False
) -> Forecast:
    """Work out what an export would write, from configurations and headers.

    Args:
        name: Folder, adapter folder or hub id.
        folder: Where it would be written.
        names: Of quantization methods.
        trust_remote_code: Whether the model's repository may run code.

    Raises:
        ConfigError: An unknown method.
        ExportError: An architecture, or something in it, that llama.cpp does not have.
        TokenizerError: A tokenizer that it does not have.
    """
    model = forecast.outline(name, device.default_dtype(), trust_remote_code=trust_remote_code)
    conversion = convert.plan(model, predict.load_tokenizer(name, trust_remote_code))
    files = tuple(_file(method, conversion) for method in save.wanted_methods(names, conversion.dtype))
    return Forecast(files, conversion.size, forecast.free_at(folder))


def _file(method: Method, conversion: Conversion) -> File:
    matrix = importance.is_wanted(method, conversion)
    if method.measured:
        plain = dynamic.budget_of(method, conversion)
        return File(method.name, sum(plain.get(t.name, t).size for t in conversion.planned), 0, matrix)
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    wanted = methods.types(method, sizes, replace(conversion.shape, imatrix=matrix))
    kinds = {name: methods.fitted(kind, sizes[name][-1]) for name, kind in wanted.items()}
    planned = [Planned(t.name, t.shape, kinds.get(t.name, t.type)) for t in conversion.planned]
    replaced = sum(kinds[name] is not kind for name, kind in wanted.items())
    return File(method.name, sum(tensor.size for tensor in planned), replaced, matrix)
