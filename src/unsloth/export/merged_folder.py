"""A merged model as a folder: weights, configuration, tokenizer, the proof, and a card; whole or absent."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth.core import artifact
from unsloth.core.log import get_logger
from unsloth.export import card, four_bit, layout, merge, shards, verify
from unsloth.models import record

REPORT = "unsloth_export.json"
_BESIDE_WEIGHTS = 64 * 2**20  # bytes; tokenizer, configuration, index

logger = get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """How to write a merged model.

    Attributes:
        options: What is merged.
        max_shard_size: Largest weight file, in bytes.
        maximum_memory_usage: Share of the free memory that the reloaded model may take.
        four_bit: Whether to quantize the merged weights to NF4.
    """

    options: merge.MergeOptions
    max_shard_size: int
    maximum_memory_usage: float
    four_bit: bool = False


def write(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    request: Request,
) -> verify.Comparison:
    """Write the merged model to ``folder``, load it again and compare it, and only then give it its name.

    Raises:
        ExportError: The result does not equal the model.
        StorageError: The disk is full (known before anything is computed), or the folder holds other files.
    """
    inner = record.transformers_model(model)
    dtype = merged_dtype(model)
    outline = merge.skeleton(model, dtype)
    planned = layout.plan(outline)
    names = four_bit.quantized_names(outline) if request.four_bit else set()
    size = sum(four_bit.sizes(names, planned))
    method = "merged_4bit" if request.four_bit else "merged_16bit"
    report = {"method": method, "dtype": str(dtype).removeprefix("torch."), **describe(model, request.options)}
    check = verify.LayerCheck(dtype, inner.dtype, request.options)
    with artifact.stage(folder, kind=method, details=report, needed_bytes=size + _BESIDE_WEIGHTS) as staging:
        tensors = merge.merged_tensors(model, dtype, request.options, observe=check)
        if request.four_bit:
            four_bit.configure(outline, dtype)
        outline.save_pretrained(staging, state_dict={})  # the configuration, and code of the model's own
        if request.four_bit:
            shards.write_held(staging, four_bit.quantized(names, tensors, inner.device), request.max_shard_size)
        else:
            shards.write(staging, planned, tensors, request.max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        # bitsandbytes does not read its layers from files one by one; in 4 bits the whole model is small.
        reload = "whole" if request.four_bit else verify.way_to_reload(model, size, request.maximum_memory_usage)
        comparison = verify.compare_reloaded(
            model, staging, tokenizer, options=request.options, reload=reload, limit=_limit(request)
        )
        report |= {"layers_checked": check.count, "reloaded": reload, "comparison": asdict(comparison)}
        (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        card.write(staging, model, report)
    logger.info("saved %s; reloaded with plain transformers: %s", folder, comparison)
    return comparison


def merged_dtype(model: torch.nn.Module) -> torch.dtype:
    """float16 for a model that computes in it, else bfloat16."""
    loaded = record.find(model)
    return torch.float16 if loaded is not None and loaded.dtype == torch.float16 else torch.bfloat16


def _limit(request: Request) -> float:
    """Rounding to 4 bits changes predictions; only a result that is another model altogether is refused."""
    return 1.0 if request.four_bit else verify.MEDIAN_KL_LIMIT


def describe(model: torch.nn.Module, options: merge.MergeOptions = merge.UNCHANGED) -> dict[str, Any]:
    """What a saved model is made of: its base (without the folder that it lies in) and its adapters."""
    loaded = record.find(model)
    inner = record.transformers_model(model)
    base = (loaded.base_name or loaded.name) if loaded is not None else inner.config._name_or_path
    adapters = options.adapters
    if adapters is None and isinstance(model, PeftModel):
        adapters = dict.fromkeys(model.active_adapters, 1.0)
    return {
        "base": card.public_name(base)[0],
        "base_held_in": loaded.precision if loaded is not None else str(inner.dtype).removeprefix("torch."),
        "adapters": dict(adapters or {}),
        "adapter_scale": options.adapter_scale,
        "base_weight": options.base_weight,
        "unsloth": sys.modules["unsloth"].__version__,
    }
