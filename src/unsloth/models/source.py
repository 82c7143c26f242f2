"""From a model's name to a checked folder: local folders, hub repositories, GGUF files, the embedded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unsloth.core.errors import CheckpointError, ConfigError, ModelNotFoundError
from unsloth.models import adapter_config, embedded, gguf, hub, weight_files


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: What the user asked for.
        location: The folder with its files, on this machine.
        is_local: Whether the user named a folder (or the embedded model) rather than a hub id.
        adapter_base: For a saved adapter, the name of the model it was trained on.
        tensors: For a model, its tensors' headers by name.
        quantization: For a model, the weight format that its config.json names, if any.
    """

    name: str
    location: str
    is_local: bool
    adapter_base: str | None = None
    tensors: Mapping[str, weight_files.TensorHeader] = field(default_factory=dict, repr=False)
    quantization: Mapping[str, object] | None = None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    gguf_file: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    subfolder: str = "",
    cache_dir: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Source:
    """Find out what ``name`` is, download it if need be, and check its files.

    Args:
        name: A folder, a hub id, or the embedded model.
        revision: Hub revision.
        token: Hub token.
        gguf_file: A GGUF file of the folder or repository, which is converted into a folder of the cache.
        weights: Whether the weights are needed; if not, they are neither fetched nor checked.
        trust_remote_code: Whether to fetch Python files of a repository.
        subfolder: Folder below ``name`` that holds the model.
        cache_dir: The hub cache; None means the usual one.
        local_files_only: Do not use the network.
        force_download: Download what is in the cache already.

    Raises:
        ConfigError: ``name`` is not a usable name.
        ModelNotFoundError: No such folder; or no such repository on the hub.
        NetworkError: The hub cannot be reached.
        CheckpointError: Files are missing or damaged.
        AdapterError: A saved adapter's configuration cannot be right.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError("model_name must be a folder or a hub id", got=name)
    if name.startswith(embedded.PREFIX):
        return _folder(name, embedded.folder(name), is_local=True, weights=weights)
    path = Path(name).expanduser()
    local = _local_folder(name, path)
    if local:
        folder = path / subfolder
    else:
        folder = hub.fetch(
            hub.Request(
                name=name,
                revision=revision,
                token=token,
                subfolder=subfolder,
                gguf_file=gguf_file,
                weights=weights,
                code=trust_remote_code,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
    if gguf_file is not None:
        folder = gguf.converted(folder, gguf_file)
    return _folder(name, folder, is_local=local, weights=weights)


def _local_folder(name: str, path: Path) -> bool:
    """Whether ``name`` is a folder here; an error if it looks like one but is not."""
    if path.is_dir():
        return True
    if path.suffix == ".gguf" and path.is_file():
        raise ModelNotFoundError(
            "model_name is a GGUF file",
            got=name,
            do=f'Name its folder, and the file apart: from_pretrained("{path.parent}", gguf_file="{path.name}").',
        )
    if path.is_file():
        raise ModelNotFoundError("model_name is a file, not a folder", got=name, do="Name the folder that holds it.")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        raise ModelNotFoundError(
            "no such model folder",
            got=name,
            do="Check the path, or give a hub id ('HuggingFaceTB/SmolLM2-135M').",
        )
    return False


def _folder(name: str, path: Path, is_local: bool, weights: bool) -> Source:
    """Check the files of a model or adapter folder."""
    if (path / adapter_config.NAME).is_file():
        base = adapter_config.check(path, is_local=is_local, weights=weights)
        return Source(name, str(path), is_local, adapter_base=base)
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(
            "not a model folder: it has no config.json",
            got=path,
            do="Name a folder written by save_pretrained, or a hub id.",
        )
    quantization = weight_files.read_json(config).get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{config} has a quantization_config that is not an object", got=quantization)
    tensors = weight_files.check(path, quantized=quantization is not None) if weights else {}
    return Source(name, str(path), is_local, tensors=tensors, quantization=quantization)
