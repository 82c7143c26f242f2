"""From a model's name to files: local folders, hub repositories, the embedded model; checked before loading."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub_errors
from transformers.utils import find_adapter_config_file

from unsloth.core import settings
from unsloth.core.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError, NetworkError
from unsloth.models import embedded

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: What the user asked for.
        location: A local folder, or a hub id.
        is_local: Whether ``location`` is a folder on this machine.
        adapter_base: For a saved adapter, the name of the model it was trained on.
    """

    name: str
    location: str
    is_local: bool
    adapter_base: str | None = None


def resolve(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Source:
    """Find out what ``name`` is, and check a local folder's files.

    Raises:
        ConfigError: ``name`` is not a usable name.
        ModelNotFoundError: No such folder; or no such repository on the hub.
        NetworkError: The hub cannot be reached.
        CheckpointError: The folder lacks files, or one of them is damaged.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError("model_name must be a folder or a hub id", got=name)
    if name.startswith(embedded.PREFIX):
        return Source(name, str(embedded.folder(name)), is_local=True)
    path = Path(name).expanduser()
    if path.is_dir():
        return _resolve_folder(name, path)
    if path.is_file():
        raise ModelNotFoundError("model_name is a file, not a folder", got=name, do="Name the folder that holds it.")
    if _looks_like_a_path(name):
        raise ModelNotFoundError(
            "no such model folder",
            got=name,
            do="Check the path, or give a hub id ('HuggingFaceTB/SmolLM2-135M').",
        )
    try:
        adapter_config = find_adapter_config_file(name, revision=revision, token=token)
    except (OSError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
        raise explain_hub_error(name, error) from error
    return Source(name, name, is_local=False, adapter_base=adapter_config and _adapter_base(Path(adapter_config)))


def explain_hub_error(name: str, error: BaseException) -> ModelError:
    """Say in one sentence why a repository could not be read; walks the chain of causes for the real reason."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, explanation in _HUB_EXPLANATIONS:
        if any(isinstance(cause, kind) for cause in causes):
            return explanation(name)
    if settings.offline():
        return _unreachable(name)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"'{name}' could not be loaded: {reason}")


def check_weight_files(folder: Path) -> None:
    """Check that every safetensors file of a model folder is there and complete, reading only the headers.

    Raises:
        CheckpointError: Names the file, and what was expected of it.
    """
    for name in _weight_files(folder):
        _check_safetensors(folder / name)


def _resolve_folder(name: str, path: Path) -> Source:
    adapter_config = path / "adapter_config.json"
    if adapter_config.is_file():
        weights = path / "adapter_model.safetensors"
        if weights.is_file():
            _check_safetensors(weights)
        elif not (path / "adapter_model.bin").is_file():
            raise CheckpointError("the adapter folder has no adapter_model.safetensors", got=path)
        return Source(name, str(path), is_local=True, adapter_base=_adapter_base(adapter_config))
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(
            "not a model folder: it has no config.json",
            got=path,
            do="Name a folder written by save_pretrained, or a hub id.",
        )
    _read_json(config)
    check_weight_files(path)
    return Source(name, str(path), is_local=True)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def _adapter_base(config_path: Path) -> str:
    base = _read_json(config_path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(
            "the adapter does not say which model it was trained on",
            got=config_path,
            do='Set "base_model_name_or_path" in that file.',
        )
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON", do="Copy or download the folder again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object", got=content)
    return content


def _weight_files(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / _INDEX} has no weight_map", do="Copy or download the folder again.")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{folder / _INDEX} points outside its folder", got=outside[0])
        return names
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    raise CheckpointError(
        f"the folder holds no weights: neither {_SINGLE} nor {_INDEX}",
        got=folder,
        do="Weights in pickle files (.bin) are not loaded; convert them to safetensors first.",
    )


def _check_safetensors(path: Path) -> None:
    """Compare a safetensors file's size with what its header says: 8 bytes, the header, the tensors."""
    if not path.is_file():
        raise CheckpointError("a weight file is missing", got=path, do="Copy or download the folder again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged header", do="Copy or download it again.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path} has {size:,} bytes instead of {expected:,}", do="Copy or download it again; it is incomplete."
        )


def _not_found(name: str) -> ModelError:
    return ModelNotFoundError(
        "no such model on the hub, and no such folder here",
        got=name,
        do="Check the spelling; for a private model pass token=...",
    )


def _gated(name: str) -> ModelError:
    return ModelNotFoundError(
        "access to this model must be asked for on its hub page",
        got=name,
        do="Then pass your hub token as token=....",
    )


def _unreachable(name: str) -> ModelError:
    return NetworkError(
        "the model hub cannot be reached, and this model is not in the local cache",
        got=name,
        do="Check the network connection, or name a local folder.",
    )


def _no_such_revision(name: str) -> ModelError:
    return ModelNotFoundError("the model has no such revision", got=name, do="Check revision=...")


_HUB_EXPLANATIONS = (
    (hub_errors.GatedRepoError, _gated),
    (hub_errors.RevisionNotFoundError, _no_such_revision),
    (hub_errors.RepositoryNotFoundError, _not_found),
    (hub_errors.HFValidationError, _not_found),
    (hub_errors.LocalEntryNotFoundError, _unreachable),
    (hub_errors.OfflineModeIsEnabled, _unreachable),
    (ConnectionError, _unreachable),
    (TimeoutError, _unreachable),
)
