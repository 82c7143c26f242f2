"""A saved LoRA adapter read for generation only: its matrices by the path of the layer that they adapt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from unsloth.core.errors import AdapterError
from unsloth.generate.adapter_bank import Pair
from unsloth.generate.weights import Projection
from unsloth.models import adapter_config, weight_files

_PREFIX = "base_model.model."


def read(folder: Path, projections: Iterable[Projection]) -> dict[str, Pair]:
    """Read the adapter in ``folder``.

    Args:
        folder: As PEFT and this library save it.
        projections: The layers of the model.

    Returns:
        A (rank, in), B (out, rank) and the scale, by the path of the layer, on the device of the layer.

    Raises:
        AdapterError: It does not fit the model, or has more than plain LoRA matrices.
        CheckpointError: It is not there, or damaged.
    """
    if not folder.is_dir():
        raise AdapterError("no such adapter folder", got=folder, do="Pass the folder that save_lora wrote.")
    adapter_config.check(folder)
    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora or config.bias != "none" or config.modules_to_save or config.lora_bias or config.fan_in_fan_out:
        raise AdapterError(
            "the adapter has more than LoRA matrices, which cannot be applied beside other adapters",
            got=folder,
            do="Load it with FastLanguageModel.from_pretrained.",
        )
    weight_files.check_file(folder / adapter_config.WEIGHTS)
    tensors = load_file(str(folder / adapter_config.WEIGHTS))
    layers = {projection.path: projection for projection in projections}
    found: dict[str, Pair] = {}
    for name in sorted(tensors):
        path, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        if part == "B.weight":
            continue
        if part != "A.weight" or path not in layers or f"{name[:-8]}B.weight" not in tensors:
            raise AdapterError(f"the adapter in {folder} does not fit the model", got=name, do=_remedy())
        pair = tensors[name], tensors[f"{name[:-8]}B.weight"]
        found[path] = (*_fitting(folder, layers[path], *pair), _scale(config, path, pair[0].shape[0]))
    if not found:
        raise AdapterError("the adapter folder holds no LoRA matrices", got=folder, do=_remedy())
    return found


def _fitting(
    folder: Path, projection: Projection, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = (projection.in_features, projection.out_features, a.shape[0])
    if (a.shape[1], b.shape[0], b.shape[1]) != wanted:
        got = (tuple(a.shape), tuple(b.shape))
        raise AdapterError(f"the adapter in {folder} does not fit {projection.path}", got=got, do=_remedy())
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        raise AdapterError(f"the adapter in {folder} holds values that are not finite", got=projection.path)
    device = projection.module.weight.device
    return a.to(device), b.to(device)


def _scale(config: LoraConfig, path: str, rank: int) -> float:
    """The scale alpha / r, with the patterns of names that PEFT lets differ."""
    alpha: Any = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def _remedy() -> str:
    return "Load it onto the model that it was trained on."
