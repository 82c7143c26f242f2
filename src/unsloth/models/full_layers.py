"""Embeddings and heads that are trained in full beside an adapter, with float32 weights on a 16-bit model."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

FULL = ("lm_head", "embed_tokens")
"""Target names that mean: train this layer itself."""


def to_float32(model: torch.nn.Module) -> None:
    """Make the trained copies float32, and convert at their borders what the 16-bit model expects.

    A 16-bit weight would not move by the small updates of continued pretraining. Tied copies stay tied.
    """
    converted: dict[int, torch.nn.Parameter] = {}
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for layer in wrapper.modules_to_save.values():
            narrow = False
            for module in layer.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.dtype not in (torch.float16, torch.bfloat16) or not parameter.requires_grad:
                        continue
                    if id(parameter) not in converted:
                        wide = torch.nn.Parameter(parameter.detach().float())
                        converted[id(parameter)] = converted[id(wide)] = wide
                    setattr(module, name, converted[id(parameter)])
                    narrow = True
            if narrow and isinstance(layer, torch.nn.Embedding):
                layer.unsloth_output_dtype = wrapper.original_module.weight.dtype
                layer.register_forward_hook(_narrow_output)
            elif narrow:
                layer.register_forward_pre_hook(_widen_input)


def _narrow_output(layer: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(layer.unsloth_output_dtype)


def _widen_input(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if torch.is_autocast_enabled(args[0].device.type):
        return args
    return (args[0].to(layer.weight.dtype), *args[1:])
