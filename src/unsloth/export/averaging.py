"""The average of a model that was trained in full and the model it was trained from, which is read from its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from unsloth.core.errors import ExportError
from unsloth.models import record, source, weight_format


def with_base(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, base_weight: float, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Average a model's tensors, one at a time, with those of the checkpoint that it was loaded from.

    Args:
        tensors: Checkpoint names and values of the trained model, float32 on the CPU.
        dtype: Of the results.
        base_weight: Share of the checkpoint in the average.
        model: Loaded by this library, which knows where from.

    Raises:
        ExportError: The checkpoint lacks a tensor of the model, or has it in another shape or as 4-bit codes.
    """
    loaded = record.require(model)
    found = source.resolve(loaded.name, revision=loaded.revision)
    with weight_format.dequantized(found) as base:
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor = torch.lerp(tensor, _base_tensor(base, name, tensor, found.name), base_weight).to(dtype)
            yield name, tensor.contiguous()


def _base_tensor(base: dict[str, Any], name: str, like: torch.Tensor, where: str) -> torch.Tensor:
    value = base[name][...] if name in base else None
    if value is None or value.shape != like.shape or not value.is_floating_point():
        raise ExportError(
            f"the base model '{where}' has no {name} to average with",
            got=None if value is None else f"{value.dtype} {list(value.shape)}",
            do="Leave base_weight out, or train an adapter, whose adapter_scale does the same.",
        )
    return value.float()
