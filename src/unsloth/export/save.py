"""The saving methods that models of this library have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core import artifact
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.core.log import get_logger
from unsloth.export import card, merged_folder, shards, upload, verify
from unsloth.export.gguf import on_model
from unsloth.export.merge import UNCHANGED, MergeOptions, weights
from unsloth.models import adapter_base, record

METHODS = ("merged_16bit", "merged_4bit_forced", "lora")

logger = get_logger(__name__)


def attach_methods(model: torch.nn.Module) -> None:
    """Give this one model its saving methods; no class is changed."""
    model.save_pretrained = MethodType(save_pretrained, model)
    model.save_pretrained_merged = MethodType(save_pretrained_merged, model)
    model.push_to_hub = MethodType(push_to_hub, model)
    model.push_to_hub_merged = MethodType(push_to_hub_merged, model)
    on_model.attach(model)


def save_pretrained(
    self: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    safe_serialization: bool | None = True,
    maximum_memory_usage: float = 0.75,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> None:
    """Save the adapter, or a model without one, as PEFT and transformers do; the folder is whole or absent.

    Other files in the folder are kept.

    Args:
        self: The model.
        save_directory: Folder to write.
        *args: Passed on.
        safe_serialization: Files are always safetensors; None says so explicitly, False is refused.
        maximum_memory_usage: Accepted for compatibility; saving needs no second copy of the weights.
        push_to_hub: Whether to upload the folder afterwards, to ``repo_id`` or the repository of the folder's name.
        token: Hub token.
        private: Visibility of a repository that is made by this; None makes it private.
        **kwargs: ``repo_id``, ``commit_message``; all others are passed on to the method of PEFT or transformers.

    Raises:
        ConfigError: ``safe_serialization=False``, which would write a pickle file.
        StorageError: The disk is full, or the folder cannot be written.
        UploadError: The hub refused the upload or could not be reached; the folder is there.
    """
    _refuse_pickle(safe_serialization)
    repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
    message = kwargs.pop("commit_message", None)
    repository = upload.prepare(repo_id, token, private) if push_to_hub else None
    _save(self, save_directory, None, *args, **kwargs)
    if repository is not None:
        upload.upload(Path(save_directory), repository, message)


def save_pretrained_merged(
    self: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    maximum_memory_usage: float = 0.75,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool | None = True,
    adapters: str | Sequence[str] | Mapping[str, float] | None = None,
    adapter_scale: float = 1.0,
    base_weight: float = 0.0,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
) -> verify.Comparison | None:
    """Save a standalone model with the adapter merged in, or the adapter alone.

    ``"merged_16bit"`` dequantizes the base, adds the adapter in float32 and rounds once to 16 bits, one tensor at a
    time. Every adapted layer is checked against the layer it replaces, and the written folder is loaded with plain
    transformers and its predictions compared, before it gets its name; what was found is kept in
    ``unsloth_export.json``. ``"merged_4bit_forced"`` quantizes the merged weights to NF4 again, which loses some of
    what was learned. ``"lora"`` saves the adapter and the tokenizer.

    Args:
        self: The model.
        save_directory: Folder to create; a folder of an earlier save is replaced.
        tokenizer: Saved with the model.
        save_method: ``"merged_16bit"``, ``"merged_4bit_forced"`` or ``"lora"``.
        maximum_memory_usage: Share of the free memory that the reloaded model may take. If it needs more, its
            layers are read from the files one after another, and no second copy of the model is held.
        max_shard_size: Largest weight file, such as ``"5GB"``.
        safe_serialization: Files are always safetensors.
        adapters: Names of the adapters to merge, or their weights by name; None takes the active ones.
        adapter_scale: Factor on ``lora_alpha``; 0.5 halves what the adapter changes.
        base_weight: Share of the base model in an average of the weights; 0.5 is the mean of base and trained model.
        push_to_hub: Whether to upload the folder afterwards, to the repository of the folder's name.
        token: Hub token.
        private: Visibility of a repository that is made by this; None makes it private.

    Returns:
        The comparison of the reloaded model with this one; None for ``"lora"``.

    Raises:
        ConfigError: An unknown or refused method, or a value out of range.
        AdapterError: The model has no such adapter.
        ExportError: The result does not equal the model. Nothing is left under the folder's name.
        StorageError: The disk is full, or the folder holds other files.
        UploadError: The hub refused the upload or could not be reached; a folder that was written is there.
    """
    _refuse_pickle(safe_serialization)
    _check_method(self, save_method)
    if not 0 < maximum_memory_usage <= 1:
        raise ConfigError("maximum_memory_usage is a share between 0 and 1", got=maximum_memory_usage)
    options = MergeOptions(weights(adapters), adapter_scale, base_weight)
    shard_size = shards.parse_size(max_shard_size)
    repository = upload.prepare(Path(save_directory).name, token, private) if push_to_hub else None
    comparison = None
    if save_method == "lora":
        if options != UNCHANGED:
            raise ConfigError(
                'save_method="lora" saves the adapter as it is', do="Leave adapters, adapter_scale, base_weight out."
            )
        _save(self, save_directory, tokenizer)
    else:
        request = merged_folder.Request(
            options, shard_size, maximum_memory_usage, four_bit=save_method == "merged_4bit_forced"
        )
        comparison = merged_folder.write(self, Path(save_directory), tokenizer, request)
    if repository is not None:
        upload.upload(Path(save_directory), repository)
    return comparison


def push_to_hub(
    self: PreTrainedModel | PeftModel,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    save_directory: str | os.PathLike[str] | None = None,
    safe_serialization: bool | None = True,
    maximum_memory_usage: float = 0.75,
    **kwargs: Any,
) -> str:
    """Save the adapter, or a model without one, and upload it.

    Args:
        self: The model.
        repo_id: ``"name"`` or ``"owner/name"``; made if there is no such repository.
        token: Hub token; None takes the one of ``hf auth login``.
        private: Visibility of a repository that is made by this; None makes it private.
        commit_message: Of the one commit that adds all files.
        save_directory: Folder for the local copy; None takes the repository's name, in the current folder.
        safe_serialization: Files are always safetensors.
        maximum_memory_usage: Accepted for compatibility.
        **kwargs: Passed on to ``save_pretrained`` of PEFT or transformers.

    Returns:
        The repository's address.

    Raises:
        UploadError: The hub refused it or could not be reached; the message says where the local copy is.
        StorageError: The local copy cannot be written.
    """
    _refuse_pickle(safe_serialization)
    repository = upload.prepare(repo_id, token, private)
    folder = Path(save_directory or upload.folder_name(repo_id))
    _save(self, folder, None, **kwargs)
    return upload.upload(folder, repository, commit_message)


def push_to_hub_merged(
    self: PreTrainedModel | PeftModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    save_directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> str:
    """Save as :func:`save_pretrained_merged` does, and upload the folder.

    The token is tried before anything is computed. Failed requests are repeated; an upload that was cut goes on where
    it was when the same call, or ``upload.upload`` with the local copy, is made again. The files appear on the hub in
    one commit, all or none.

    Args:
        self: The model.
        repo_id: ``"name"`` or ``"owner/name"``; made if there is no such repository.
        tokenizer: Saved with the model.
        save_method: As in :func:`save_pretrained_merged`.
        token: Hub token; None takes the one of ``hf auth login``.
        private: Visibility of a repository that is made by this; None makes it private.
        commit_message: Of the one commit that adds all files.
        save_directory: Folder for the local copy; None takes the repository's name, in the current folder.
        **options: As in :func:`save_pretrained_merged`.

    Returns:
        The repository's address.

    Raises:
        UploadError: The hub refused it or could not be reached; the message says where the local copy is.
        UnslothError: As :func:`save_pretrained_merged`.
    """
    _check_method(self, save_method)
    repository = upload.prepare(repo_id, token, private)
    folder = Path(save_directory or upload.folder_name(repo_id))
    save_pretrained_merged(self, folder, tokenizer, save_method, **options)
    return upload.upload(folder, repository, commit_message)


def _save(
    model: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    kind = "adapter" if isinstance(model, PeftModel) else "model"
    needed = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or kind == "model")
    loaded = record.find(model)
    if kind == "adapter" and loaded is not None and loaded.vocabulary_resized:
        kwargs.setdefault("save_embedding_layers", True)
    existing: Literal["replace", "extend"] = "replace" if _is_merged(Path(save_directory)) else "extend"
    with artifact.stage(save_directory, kind=kind, existing=existing, needed_bytes=needed) as staging:
        type(model).save_pretrained(model, str(staging), *args, **kwargs)
        if kind == "adapter":
            adapter_base.write(staging, model)
            card.write(staging, model, merged_folder.describe(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))


def _is_merged(folder: Path) -> bool:
    """Whether the folder holds a merged model of ours, which an adapter must not be mixed with."""
    manifest = artifact.read_manifest(folder)
    return manifest is not None and manifest["kind"].startswith("merged_")


def _refuse_pickle(safe_serialization: bool | None) -> None:
    if safe_serialization is False:
        raise ConfigError(
            "weights are not saved in pickle files, which can run code when they are loaded",
            got="safe_serialization=False",
            do="Leave it out.",
        )


def check_method(save_method: str) -> None:
    """Raise :class:`ConfigError` for a ``save_method`` that there is not, or that is refused, with the reason."""
    if save_method == "merged_4bit":
        raise ConfigError(
            'save_method="merged_4bit" rounds the merged weights to 4 bits again: some of what was learned is lost, '
            "and no GGUF file should be made of the result",
            do='Use "merged_16bit", or "merged_4bit_forced" if 4-bit weights are what you want.',
        )
    if save_method == "mxfp4":
        raise ConfigError(
            'save_method="mxfp4" is the format of gpt-oss, and is not written here',
            do='Use "merged_16bit", which every engine reads.',
        )
    if save_method not in METHODS:
        raise ConfigError("unknown save_method", got=save_method, do=f"Available are: {', '.join(METHODS)}.")


def _check_method(model: torch.nn.Module, save_method: str) -> None:
    check_method(save_method)
    if save_method == "lora" and not isinstance(model, PeftModel):
        raise AdapterError("the model has no adapter to save", do='Use save_method="merged_16bit".')
