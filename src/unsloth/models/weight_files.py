"""The weight files of a model folder: which there are, and whether each is whole; only headers are read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth.core.errors import CheckpointError
from unsloth.core.log import get_logger

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATING = {"F64", "F32", "F16", "BF16"}
FLOAT8 = {"F8_E4M3", "F8_E5M2"}

logger = get_logger(__name__)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor.

    Attributes:
        file: That holds it.
        dtype: Such as ``"BF16"``.
        shape: Of the tensor.
        start: Its first byte in the file.
        size: Its bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def check(folder: Path, *, quantized: bool = False) -> dict[str, TensorHeader]:
    """Check that every weight file of a model folder is there and complete; return its tensors' headers.

    Args:
        folder: The model folder.
        quantized: Whether its configuration names a weight format, so that weights need not be floating-point.

    Raises:
        CheckpointError: Names the file, and what was expected of it.
    """
    tensors: dict[str, TensorHeader] = {}
    for name in _names(folder):
        tensors.update(check_file(folder / name))
    if not quantized:
        _check_floating(tensors)
    return tensors


def check_file(path: Path) -> dict[str, TensorHeader]:
    """Compare a safetensors file's size with what its header says: 8 bytes, the header, the tensors."""
    if not path.is_file():
        raise CheckpointError("a weight file is missing", got=path, do="Copy or download the folder again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= size - 8:
            looks = " It looks like a web page." if prefix.lstrip()[:1] == b"<" else ""
            raise CheckpointError(
                f"{path} is not a safetensors file, or is cut short ({size:,} bytes).{looks}",
                do="Copy or download it again.",
            )
        try:
            header = json.loads(file.read(length))
            tensors = dict(_entries(path, header, 8 + length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged header", do="Copy or download it again.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path} has {size:,} bytes instead of {expected:,}", do="Copy or download it again; it is incomplete."
        )
    return tensors


def listed_in(index: Path) -> list[str]:
    """The file names in an index; raise :class:`CheckpointError` if one points outside the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", do="Copy or download the folder again.")
    names = {str(name) for name in weight_map.values()}
    outside = sorted(name for name in names if Path(name).name != name or "\\" in name or name in (".", ".."))
    if outside:
        raise CheckpointError(
            f"{index} points outside its folder",
            got=outside[0],
            do="Nothing was read from there. Do not use this folder unless you know who made it.",
        )
    return sorted(names)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raise :class:`CheckpointError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON", do="Copy or download the folder again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object", got=content)
    return content


def pickled(where: object) -> CheckpointError:
    """The error for weights that exist in pickle files only."""
    return CheckpointError(
        f"{where} holds its weights in pickle files, which can run code when they are read",
        do="Convert a local copy once into a new folder, without running anything in it: "
        "python -m unsloth.models.unpickle FOLDER NEW_FOLDER",
    )


def _names(folder: Path) -> list[str]:
    has_single, has_index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    names = listed_in(folder / INDEX) if has_index else []
    if has_single and has_index and names != [SINGLE]:
        raise CheckpointError(
            f"the folder holds two sets of weights, {SINGLE} and those that {INDEX} lists",
            got=folder,
            do="Delete the one that is out of date.",
        )
    if has_single:
        names = [SINGLE]
    if names:
        _mention_strays(folder, names)
        return names
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise pickled(folder)
    if any(folder.glob("*.gguf")):
        name = next(folder.glob("*.gguf")).name
        raise CheckpointError("the folder holds a GGUF file", got=folder, do=f'Load it with gguf_file="{name}".')
    raise CheckpointError(
        f"the folder holds no weights: neither {SINGLE} nor {INDEX}",
        got=folder,
        do="Copy or download it again.",
    )


def _mention_strays(folder: Path, names: list[str]) -> None:
    """Say which shards of another save lie beside the ones that count."""
    strays = sorted(path for path in folder.glob("model-*-of-*.safetensors") if path.name not in names)
    if strays:
        first = f"{strays[0].name} ({strays[0].stat().st_size:,} bytes)"
        logger.warning("%s: %d weight files are not part of the model and are not read: %s", folder, len(strays), first)


def _entries(path: Path, header: Mapping[str, Any], data: int) -> Iterator[tuple[str, TensorHeader]]:
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, TensorHeader(path, entry["dtype"], tuple(entry["shape"]), data + start, stop - start)


def _check_floating(tensors: Mapping[str, TensorHeader]) -> None:
    wrong = [
        (name, header)
        for name, header in tensors.items()
        if name.endswith((".weight", ".bias")) and header.dtype not in FLOATING
    ]
    if wrong:
        name, header = wrong[0]
        raise CheckpointError(
            f"{name} in {header.file} holds {header.dtype} values, and config.json names no weight format for them",
            do="The configuration and the weights do not belong together; copy or download both again.",
        )
