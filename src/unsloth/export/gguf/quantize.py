"""Quantizing a GGUF file: one conversion in, a file of any method out, the same bits as llama.cpp's own quantizer.

The arithmetic is ggml's, compiled, from the package ``libgguf`` (extra ``export``); without it, llama.cpp's own
quantizer does the work, where a package carries it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, Keys

from unsloth.core.errors import ConfigError, ExportError
from unsloth.export.gguf import methods, runtime
from unsloth.export.gguf.file import Planned, Reader, Writer
from unsloth.export.gguf.methods import Method, Shape

Imatrix = Mapping[str, np.ndarray]
"""Mean square of each input of a matrix, [columns] in float32, by the tensor's name in the file."""

_VERSION = 2  # of the quantized types' layout, as ggml counts
_CHUNK = 2**21  # elements that one thread quantizes at a time


@dataclass(frozen=True)
class Job:
    """What becomes of a file.

    Attributes:
        method: Its file type, which also gives every tensor's type.
        imatrix: Importance of inputs, or None.
        types: Types of single tensors by name, before the method's; for mixtures chosen by measurement.
    """

    method: Method
    imatrix: Imatrix | None = None
    types: Mapping[str, Type] | None = None


@dataclass(frozen=True)
class Replaced:
    """A tensor that did not get the type that its method says.

    Attributes:
        name: Of the tensor.
        wanted: Type of the method.
        got: Type that it has, whose blocks divide its rows.
        width: Of its rows.
    """

    name: str
    wanted: Type
    got: Type
    width: int


def plan(
    tensors: Mapping[str, tuple[tuple[int, ...], Type]], shape: Shape, job: Job
) -> tuple[list[Planned], list[Replaced]]:
    """The type of every tensor of the result.

    Args:
        tensors: Shape and present type by name, in the order of the file.
        shape: Of the model.
        job: What is wanted.

    Returns:
        The tensors as they will be written, and those whose width does not allow their method's type.

    Raises:
        ConfigError: A type for a tensor that is not there, or is never quantized.
        ExportError: A type that needs an importance matrix without one.
    """
    wanted = methods.types(job.method, {name: found for name, (found, _) in tensors.items()}, shape)
    for name, kind in (job.types or {}).items():
        if name not in wanted:
            raise ConfigError("a type was given for a tensor that cannot have one", got=name)
        wanted[name] = kind
    planned, replaced = [], []
    for name, (size, present) in tensors.items():
        kind = wanted.get(name, present)
        fitting = methods.fitted(kind, size[-1])
        if fitting is not kind:
            replaced.append(Replaced(name, kind, fitting, size[-1]))
        if methods.needs_imatrix(job.method, name, fitting) and name not in (job.imatrix or {}):
            raise _needs_imatrix(job.method, name, fitting, job.imatrix is not None)
        planned.append(Planned(name, size, fitting))
    return planned, replaced


def _needs_imatrix(method: Method, name: str, kind: Type, given: bool) -> ExportError:
    lacks = f"the importance matrix has nothing for {name}" if given else "there is no importance matrix"
    return ExportError(
        f"{method.name} stores {name} as {kind.name}, which is useless without an importance matrix; {lacks}",
        do="Pass imatrix_file=, made from this model, or choose q2_k or larger.",
    )


def check_imatrix(imatrix: Imatrix, tensors: Mapping[str, tuple[tuple[int, ...], Type]], source: object) -> None:
    """Raise :class:`ExportError` unless the matrix belongs to a model with these tensors."""
    for name, values in imatrix.items():
        if name not in tensors:
            raise ExportError(
                f"the importance matrix {source} is of another model: this one has no {name}", do="Make one from it."
            )
        size = tensors[name][0]
        expected = size[-1] * (size[0] if len(size) == 3 else 1)
        if values.size != expected or not np.isfinite(values).all():
            raise ExportError(
                f"the importance matrix {source} does not fit {name}: {values.size:,} numbers for {expected:,} inputs",
                do="Make one from this model.",
            )
    expected_names = (n for n, (size, _) in tensors.items() if n.startswith("blk.") and methods.is_quantized(n, size))
    without = next((name for name in expected_names if name not in imatrix), None)
    if without is not None:
        raise ExportError(
            f"the importance matrix {source} is of another model, or not whole: it has nothing for {without}",
            do="Make one from this model.",
        )


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """An importance matrix in one of llama.cpp's two formats, as float32 [columns] by the tensor's name.

    Raises:
        ExportError: The file is damaged, or is no importance matrix.
        ConfigError: ``libgguf`` is not installed.
    """
    try:
        found: dict[str, np.ndarray] = library().load_imatrix(path)
    except (ValueError, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        raise ExportError(f"the importance matrix {path} cannot be read: {error}", do="Make it again.") from error
    return found


def check_possible(job: Job, shard_bytes: int) -> None:
    """Raise :class:`ConfigError` unless something installed can carry the job out; before anything is written."""
    if job.method.type in methods.PLAIN and not job.types:
        return
    if _by_llama_cpp() and not job.types and not shard_bytes:
        return
    library()


def _by_llama_cpp() -> bool:
    """Whether llama.cpp's own quantizer is to be used, for want of ``libgguf``."""
    return importlib.util.find_spec("libgguf") is None and runtime.available() is not None


def library() -> Any:
    """The package ``libgguf``."""
    try:
        return importlib.import_module("libgguf")
    except ImportError as error:
        raise ConfigError(
            "quantizing GGUF files needs the package libgguf, which is not installed",
            do='Run: pip install "unsloth[export]". Without it there are f32, f16 and bf16.',
        ) from error


def write(source: Reader, target: Path, planned: list[Planned], job: Job, shard_bytes: int = 0) -> list[Path]:
    """Write the quantized file.

    Args:
        source: The unquantized file.
        target: The file to write.
        planned: From :func:`plan`.
        job: What is wanted.
        shard_bytes: Largest shard; 0 for one file.

    Returns:
        The files written.
    """
    if job.method.type not in methods.PLAIN and _by_llama_cpp():
        runtime.quantize(source.path, target, job.method, job.imatrix)
        return [target]
    header = source.header
    metadata = typed(header.metadata)
    metadata[Keys.General.FILE_TYPE] = (int(job.method.file_type), GGUFValueType.UINT32)
    metadata[Keys.General.QUANTIZATION_VERSION] = (_VERSION, GGUFValueType.UINT32)
    by_name = {tensor.name: tensor for tensor in header.tensors}
    architecture = header.metadata["general.architecture"]
    with Writer(target, architecture, metadata, planned, shard_bytes) as writer:
        for tensor in planned:
            present = by_name[tensor.name]
            if present.type == tensor.type:
                writer.put(tensor.name, source.raw(present))
            else:
                values = source.float32(present)
                writer.put(tensor.name, encode(values, tensor.type, (job.imatrix or {}).get(tensor.name)))
    return writer.paths


def typed(metadata: Mapping[str, Any]) -> dict[str, tuple[Any, GGUFValueType]]:
    """Entries as they were read, with the types by which this library writes them."""
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    kinds |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    return {key: (value, kinds[type(value)]) for key, value in metadata.items()}


def encode(values: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """Float32 values as the bytes of a type.

    Args:
        values: [..., columns].
        kind: Of the result.
        importance: [columns], or [experts, columns] for [experts, rows, columns]; None for equal importance.

    Returns:
        uint8, in the order of the rows.
    """
    if kind in methods.PLAIN:
        return _plain(values, kind)
    if values.ndim == 3:
        each = [None] * len(values) if importance is None else importance.reshape(len(values), -1)
        return np.concatenate([encode(v, kind, i) for v, i in zip(values, each, strict=True)])
    columns = values.shape[-1]
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, columns)
    step = max(1, _CHUNK // columns)
    pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32).reshape(-1)
    quantize_rows_raw = library().quantize_rows_raw
    build_tables(kind)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        done = pool.map(lambda piece: quantize_rows_raw(kind, piece, len(piece), columns, weights), pieces)
        return np.concatenate([np.frombuffer(piece, dtype=np.uint8) for piece in done])


def build_tables(kind: Type) -> None:
    """Let the library build a type's tables, which it does at their first use and not safely in several threads."""
    width = methods.block(kind)
    library().quantize_rows_raw(kind, np.ones((1, width), np.float32), 1, width, np.ones(width, np.float32))


def _plain(values: np.ndarray, kind: Type) -> np.ndarray:
    if kind is Type.BF16:
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().reshape(-1).view(np.uint8)
    return values.astype(np.float16 if kind is Type.F16 else np.float32).reshape(-1).view(np.uint8)
