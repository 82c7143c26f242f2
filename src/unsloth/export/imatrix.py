"""The importance matrix of a model: how large the inputs of each of its matrices are, column by column.

A quantizer that knows it spends its bits on the columns that matter: it minimizes ``sum_c a_c (q_c - w_c)^2`` over a
block instead of ``sum_c (q_c - w_c)^2``, where ``a_c`` is the mean of the squared inputs of column ``c``. The method
and the two file formats are llama.cpp's (MIT, ``tools/imatrix``, build b10605).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter

from unsloth.core import artifact
from unsloth.core.errors import ConfigError, ExportError
from unsloth.export.calibration import Text
from unsloth.export.gguf import methods
from unsloth.export.gguf.convert import Conversion
from unsloth.models import plan
from unsloth.models.record import transformers_model

See = Callable[[str, torch.Tensor], None]
"""Is told the name of a tensor of the file and the input of its layer, [..., columns]."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """What was measured, by the tensor's name in the file.

    Attributes:
        sums: Sums of the squared inputs, float32 [experts, columns]; one expert in dense layers.
        counts: Number of inputs in each sum, int64 [experts].
        source: Where the text is from.
        chunks: Number of chunks of text.
        chunk_size: Of a chunk, in tokens.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    source: str
    chunks: int
    chunk_size: int

    def means(self) -> dict[str, np.ndarray]:
        """Mean squares as a quantizer takes them, float32 [experts * columns]; 1 for an expert without input."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32).reshape(-1)
        return found


class Sums:
    """Adds up squared inputs, on the device where they are."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    @torch.no_grad()
    def add(self, name: str, inputs: torch.Tensor, expert: int = 0) -> None:
        """Add the inputs [..., columns] of a tensor, or of one of the experts in it."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        squares, key = rows.square().sum(0), (name, expert)
        self._sums[key] = self._sums[key] + squares if key in self._sums else squares
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def collected(self, name: str, experts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Sums, float32 [experts, columns], and counts, int64 [experts], of one tensor.

        Raises:
            ExportError: Nothing was added, or something that is no number.
        """
        there = [self._sums[name, expert] for expert in range(experts) if (name, expert) in self._sums]
        if not there:
            raise ExportError(
                f"the layer of {name} was never called, so its importance is unknown",
                do="Calibrate on more text; if that does not help, report this with the model's name.",
            )
        zero = torch.zeros_like(there[0])
        sums = torch.stack([self._sums.get((name, expert), zero) for expert in range(experts)]).cpu().numpy()
        if not np.isfinite(sums).all():
            raise ExportError(
                f"the inputs of {name} are not finite numbers", do="Check the model: its answers are likely NaN too."
            )
        return sums, np.array([self._counts.get((name, expert), 0) for expert in range(experts)])


def targets(conversion: Conversion) -> dict[str, str]:
    """The layers whose inputs are measured: path of the module, and name of its weight in the file.

    The matrices of the blocks, as in llama.cpp's own tool; the output head is quantized without an importance.
    """
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    found = {}
    for weight, rule in conversion.rules.items():
        quantized = rule.name in sizes and methods.is_quantized(rule.name, sizes[rule.name])
        if quantized and rule.name.startswith("blk."):
            found[weight.removesuffix(".weight")] = rule.name
    return found


@contextmanager
def watched(model: torch.nn.Module, layers: Mapping[str, str], see: See) -> Iterator[None]:
    """Tell ``see`` the inputs of layers, for the length of a block.

    The model runs without its plan, in evaluation mode: fused paths never call the layers they replace.

    Args:
        model: With or without adapters.
        layers: Name of the tensor by the path of the module in the transformers model.
        see: Is called at every call of a layer.
    """
    inner = transformers_model(model)
    training = {module: module.training for module in model.modules()}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def hook(name: str) -> Callable[..., None]:
        def observe(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return observe

    with plan.suspended(model):
        try:
            for path, name in layers.items():
                module = inner.get_submodule(path)
                handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
            model.eval()
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode


@torch.no_grad()
def measure(model: torch.nn.Module, conversion: Conversion, text: Text) -> ImportanceMatrix:
    """Run a model over a text and add up the squared inputs of its layers.

    Also in the middle of a training run: modes, gradients and the plan are as before afterwards.

    Args:
        model: With or without adapters.
        conversion: Of the model, from :func:`unsloth.export.gguf.convert.plan`.
        text: To run it on.

    Raises:
        ExportError: A layer was not called, or has inputs that are not finite.
    """
    inner, sums, layers = transformers_model(model), Sums(), targets(conversion)
    with watched(model, layers, sums.add):
        for chunk in text.chunks:
            inner(input_ids=chunk[None].to(inner.device), use_cache=False)
    return matrix(sums, conversion, text)


def matrix(sums: Sums, conversion: Conversion, text: Text) -> ImportanceMatrix:
    """The importance matrix of what was added up; raises as :func:`measure` does."""
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    names = list(targets(conversion).values())
    found = {name: sums.collected(name, sizes[name][0] if len(sizes[name]) == 3 else 1) for name in names}
    return ImportanceMatrix(
        sums={name: each for name, (each, _) in found.items()},
        counts={name: each for name, (_, each) in found.items()},
        source=text.source,
        chunks=len(text.chunks),
        chunk_size=max(map(len, text.chunks)),
    )


def write(found: ImportanceMatrix, path: str | os.PathLike[str]) -> Path:
    """Write the file: GGUF, or llama.cpp's older format if its name ends in ``.dat``.

    The file appears whole or not at all; one that is there is replaced.

    Raises:
        ConfigError: Another suffix.
        StorageError: The disk is full, or the folder cannot be written.
    """
    target = check_suffix(path)
    partial = target.with_name(f".{target.name}.part")
    with artifact.readable_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_gguf if target.suffix == ".gguf" else _write_dat)(found, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def check_suffix(path: str | os.PathLike[str]) -> Path:
    """The path of the file to write; raises :class:`ConfigError` unless its name says one of the two formats."""
    target = Path(path).expanduser()
    if target.suffix not in (".gguf", ".dat"):
        raise ConfigError("an importance matrix is a .gguf file, or a .dat file for older programs", got=str(path))
    return target


def _write_gguf(found: ImportanceMatrix, path: Path) -> None:
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # such a file has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [found.source])
    writer.add_uint32("imatrix.chunk_count", found.chunks)
    writer.add_uint32("imatrix.chunk_size", found.chunk_size)
    for name, sums in found.sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(sums, dtype=np.float32))
        writer.add_tensor(f"{name}.counts", found.counts[name].astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_dat(found: ImportanceMatrix, path: Path) -> None:
    """The older format has one count a tensor, of chunks, and means multiplied by it."""
    means = found.means()
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(means)))
        for name, values in means.items():
            raw = name.encode()
            file.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", found.chunks, values.size))
            file.write((values * np.float32(found.chunks)).astype("<f4").tobytes())
        source = found.source.encode()
        file.write(struct.pack("<ii", found.chunks, len(source)) + source)
