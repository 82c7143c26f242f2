"""The saving methods that models of this library have."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core import artifact
from unsloth.core.errors import AdapterError, ConfigError
from unsloth.core.log import get_logger
from unsloth.export import merge, verify
from unsloth.export.gguf import on_model
from unsloth.models import adapter_base, record

logger = get_logger(__name__)


def attach_methods(model: torch.nn.Module) -> None:
    """Give this one model its saving methods; no class is changed."""
    model.save_pretrained = MethodType(save_pretrained, model)
    model.save_pretrained_merged = MethodType(save_pretrained_merged, model)
    on_model.attach(model)


def save_pretrained(
    self: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    safe_serialization: bool | None = True,
    maximum_memory_usage: float = 0.75,
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
        **kwargs: Passed on to the method of PEFT or transformers.

    Raises:
        ConfigError: ``safe_serialization=False``, which would write a pickle file.
        StorageError: The disk is full, or the folder cannot be written.
    """
    if safe_serialization is False:
        raise ConfigError(
            "weights are not saved in pickle files, which can run code when they are loaded",
            got="safe_serialization=False",
            do="Leave it out.",
        )
    if kwargs.get("push_to_hub"):
        raise _no_hub_yet()
    kind = "adapter" if isinstance(self, PeftModel) else "model"
    needed = sum(p.numel() * p.element_size() for p in self.parameters() if p.requires_grad or kind == "model")
    loaded = record.find(self)
    if kind == "adapter" and loaded is not None and loaded.vocabulary_resized:
        kwargs.setdefault("save_embedding_layers", True)
    with artifact.stage(save_directory, kind=kind, existing="extend", needed_bytes=needed) as staging:
        type(self).save_pretrained(self, str(staging), *args, **kwargs)
        if kind == "adapter":
            adapter_base.write(staging, self)


def save_pretrained_merged(
    self: PreTrainedModel | PeftModel,
    save_directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    maximum_memory_usage: float = 0.75,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool | None = True,
    push_to_hub: bool = False,
    token: str | None = None,
) -> verify.Comparison | None:
    """Save a standalone model with the adapter merged in, or the adapter alone.

    ``"merged_16bit"`` dequantizes the base, adds the adapter in float32 and rounds once to 16 bits; every layer is
    checked against the layer it replaces, and the written folder is loaded with plain transformers and its
    predictions compared, before it gets its name. ``"lora"`` saves the adapter and the tokenizer.

    Args:
        self: The model.
        save_directory: Folder to create; a folder of an earlier save is replaced.
        tokenizer: Saved with the model.
        save_method: ``"merged_16bit"`` or ``"lora"``.
        maximum_memory_usage: Share of the free memory that the comparison may use; without room for it, it is
            left out, and the log says so.
        max_shard_size: Largest weight file, such as ``"5GB"``.
        safe_serialization: Files are always safetensors.
        push_to_hub: Not available yet.
        token: Hub token.

    Returns:
        The comparison of the reloaded model with this one, if it was made.

    Raises:
        ConfigError: An unknown or unavailable method.
        ExportError: The result does not equal the model. Nothing is left under the folder's name.
        StorageError: The disk is full, or the folder holds other files.
    """
    if push_to_hub or token:
        raise _no_hub_yet()
    if not 0 < maximum_memory_usage <= 1:
        raise ConfigError("maximum_memory_usage is a share between 0 and 1", got=maximum_memory_usage)
    if save_method == "lora":
        if not isinstance(self, PeftModel):
            raise AdapterError("the model has no adapter to save", do='Use save_method="merged_16bit".')
        save_pretrained(self, save_directory, safe_serialization=safe_serialization)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(save_directory))
        return None
    if save_method != "merged_16bit":
        raise ConfigError("unknown save_method", got=save_method, do='Available are "merged_16bit" and "lora".')
    return _save_merged_16bit(self, Path(save_directory), tokenizer, maximum_memory_usage, max_shard_size)


def _save_merged_16bit(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    maximum_memory_usage: float,
    max_shard_size: int | str,
) -> verify.Comparison | None:
    inner = record.transformers_model(model)
    loaded = record.find(model)
    dtype = torch.float16 if loaded is not None and loaded.dtype == torch.float16 else torch.bfloat16
    size = verify.parameter_bytes(inner, dtype)
    details: dict[str, Any] = {"base": inner.config._name_or_path, "dtype": str(dtype).removeprefix("torch.")}
    comparison = None
    with artifact.stage(folder, kind="merged_16bit", details=details, needed_bytes=size) as staging:
        details["layers_checked"] = verify.check_layers(model, dtype)
        merge.skeleton(model, dtype).save_pretrained(
            staging, state_dict=dict(merge.model_tensors(model, dtype)), max_shard_size=max_shard_size
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        if verify.fits_for_comparison(model, size, maximum_memory_usage):
            comparison = verify.compare_reloaded(model, staging, tokenizer)
            details["comparison"] = asdict(comparison)
            logger.info("saved %s; reloaded with plain transformers: %s", folder, comparison)
        else:
            logger.warning(
                "saved %s; there is no room to load it beside the model, so only its layers were checked", folder
            )
    return comparison


def _no_hub_yet() -> ConfigError:
    return ConfigError(
        "uploading to the hub is not available yet",
        do="Save to a folder, then upload it: huggingface_hub.upload_folder(repo_id=..., folder_path=...).",
    )
