"""Merging: the weights that a model with adapters amounts to, in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper

from unsloth.core.errors import ExportError
from unsloth.models.record import transformers_model
from unsloth.quant import int8, nf4

_DEQUANTIZE = {"Params4bit": nf4.dequantize, "Int8Params": int8.dequantize}


def merged_tensors(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model with its adapters merged, under the name it has in the model without them.

    A quantized weight is dequantized afresh; the update ``scaling * B @ A`` (or PEFT's variant of it, such as
    DoRA) is added in float32, and the sum rounded once to ``dtype``. The model itself is not touched.

    Args:
        model: With or without adapters.
        dtype: Of the floating-point results.

    Yields:
        Name and contiguous CPU tensor, one layer at a time. A tied weight comes once, under its first name.

    Raises:
        ExportError: An adapter of a kind that cannot be merged, or one that is merged into quantized weights
            already; or a merged weight that is not finite.
    """
    inner = transformers_model(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ExportError("a prompt-learning adapter cannot be merged", got=model.active_peft_config.peft_type)
    wrapped: list[str] = []  # paths of the wrappers, whose inner modules are dealt with there
    seen: set[int] = set()  # parameters already yielded
    for path, module in inner.named_modules():
        if any(path.startswith(prefix) for prefix in wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped.append(f"{path}.")
        for name, tensor in _module_tensors(path, module):
            if id(tensor) in seen:
                continue
            if isinstance(tensor, torch.nn.Parameter):
                seen.add(id(tensor))
            value = tensor.detach()
            if value.is_floating_point():
                value = value.to(dtype)
                if not torch.isfinite(value).all():
                    raise ExportError(f"the merged weight {path}.{name} has values that are not finite in {dtype}")
            yield (f"{path}.{name}" if path else name), value.cpu().contiguous()


@torch.no_grad()
def merged_weight(module: LoraLayer) -> torch.Tensor:
    """The float32 weight that a LoRA layer amounts to with its active adapters, on the layer's device."""
    base = module.get_base_layer()
    weight = _values(base).float().clone()
    if module.merged:
        return weight
    for adapter in module.active_adapters:
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        variant = module.lora_variant.get(adapter)
        if variant is not None:
            weight = variant.merge_safe(module, adapter, weight)
        else:
            weight += module.get_delta_weight(adapter).float()  # type: ignore[operator]
    return weight


def _values(module: torch.nn.Module) -> torch.Tensor:
    """The module's weight, dequantized if it is quantized."""
    dequantize = _DEQUANTIZE.get(type(module.weight).__name__)
    return (dequantize(module) if dequantize else module.weight).detach()


def _module_tensors(path: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names (relative to ``module`` as it is without adapters) and values of the module's own tensors."""
    if isinstance(module, ModulesToSaveWrapper):
        trained = (
            module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
        )
        yield from trained.named_parameters()  # parameters, so that a tied one is recognized
        yield from trained.named_buffers()
    elif isinstance(module, LoraLayer):
        yield from _lora_tensors(path, module)
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ExportError(f"the adapter at {path} cannot be merged", got=type(module).__name__)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield name, _values(module) if type(parameter).__name__ in _DEQUANTIZE else parameter
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield name, buffer


def _lora_tensors(path: str, module: LoraLayer) -> Iterator[tuple[str, torch.Tensor]]:
    base = module.get_base_layer()
    quantized = type(getattr(base, "weight", None)).__name__ in _DEQUANTIZE
    if module.merged and quantized:
        raise ExportError(
            f"the adapter at {path} is already merged into quantized weights, which lost precision by it",
            do="Call model.unmerge_adapter(), or load the adapter again, and save then.",
        )
    yield "weight", merged_weight(module)
    bias = getattr(base, "bias", None)
    if bias is None:
        return
    bias = bias.detach().float().clone()
    for adapter in () if module.merged else module.active_adapters:
        if module.lora_bias.get(adapter):
            bias += module.lora_B[adapter].bias.detach().float() * module.scaling[adapter]
    yield "bias", bias
