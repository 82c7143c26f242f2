"""Merging: the weights that a model with adapters amounts to, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from unsloth.core.errors import AdapterError, ConfigError, ExportError
from unsloth.export import averaging, layout
from unsloth.models.record import transformers_model
from unsloth.quant import int8, nf4

_DEQUANTIZE = {"Params4bit": nf4.dequantize, "Int8Params": int8.dequantize}
_BLOCK = 2**23  # elements of a weight that are summed in float32 at a time

Observer = Callable[[str, LoraLayer, torch.Tensor], None]


@dataclass(frozen=True)
class MergeOptions:
    """Which adapters are merged, and how much of them.

    With the base weight W, the change D_i that adapter i makes to it (for LoRA ``scaling * B @ A``; for DoRA and for
    weights trained in full, the trained weight less W), the merged weight is

        W + (1 - base_weight) * sum_i weight_i * scale_i * D_i

    where ``scale_i`` is ``adapter_scale`` for LoRA and DoRA, and 1 for weights trained in full.

    Attributes:
        adapters: Weight of each adapter by its name; None takes the active ones with weight 1.
        adapter_scale: Factor on ``lora_alpha``. Below 1 it weakens what was learned, a remedy for overfitting.
        base_weight: Share of the base model in an average of the weights, from 0 to below 1; 0.5 is the mean of base
            and trained model (Wortsman et al., 2022, arXiv:2109.01903). For weights trained in full it is the only
            one of the two that has an effect.
    """

    adapters: Mapping[str, float] | None = None
    adapter_scale: float = 1.0
    base_weight: float = 0.0

    def __post_init__(self) -> None:
        numbers = [self.adapter_scale, *(self.adapters or {}).values()]
        if not all(isinstance(value, int | float) and abs(value) < float("inf") for value in numbers):
            raise ConfigError("adapter_scale and the weights of adapters are finite numbers", got=numbers)
        if self.adapters is not None and not self.adapters:
            raise ConfigError(
                "no adapter to merge", got=self.adapters, do="Leave adapters out to merge the active one."
            )
        if not 0 <= self.base_weight < 1:
            raise ConfigError("base_weight is a share from 0 to below 1", got=self.base_weight)


UNCHANGED = MergeOptions()
"""The active adapters, as they are."""


def weights(adapters: str | Sequence[str] | Mapping[str, float] | None) -> Mapping[str, float] | None:
    """Weight of each adapter by its name, where names alone mean a weight of 1."""
    if adapters is None or isinstance(adapters, Mapping):
        return adapters
    return dict.fromkeys([adapters] if isinstance(adapters, str) else adapters, 1.0)


def merged_tensors(
    model: torch.nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    options: MergeOptions = UNCHANGED,
    *,
    observe: Observer | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the merged model, under the name that it has in a checkpoint of transformers.

    A quantized weight is dequantized afresh; the changes of the adapters are added in float32, and the sum is rounded
    once to ``dtype``. The model itself is not touched. One tensor is held at a time (the tensors of one layer, where
    the checkpoint splits or joins them), and of a sum of an adapter and a weight, a block of rows in float32.

    Args:
        model: With or without adapters.
        dtype: Of the floating-point results.
        options: Which adapters, and how much of them.
        observe: Called with path, layer and merged weight [out, in] (on the CPU) of every adapted layer.

    Yields:
        Name and contiguous CPU tensor. A tied weight comes once, under its first name.

    Raises:
        AdapterError: An adapter that the model does not have.
        ExportError: An adapter of a kind that cannot be merged, or one that is merged into quantized weights
            already; or a merged weight that is not finite.
    """
    outline = skeleton(model, dtype)
    if options.base_weight == 0 or isinstance(model, PeftModel):
        yield from layout.in_checkpoint(outline, model_tensors(model, dtype, options, observe=observe))
        return
    own = layout.in_checkpoint(outline, model_tensors(model, torch.float32))
    yield from averaging.with_base(own, dtype, options.base_weight, model)


def skeleton(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The merged model on the meta device: its ``config`` and ``generation_config`` are those to save with it."""
    inner = transformers_model(model)
    names = {entry.name for entry in _entries(model, UNCHANGED)}
    # An output head that was trained apart from the embedding it was tied to is not tied any more.
    own_head = any(name in names for name in inner._tied_weights_keys or ())
    return layout.skeleton(inner, dtype, own_head)


def model_tensors(
    model: torch.nn.Module,
    dtype: torch.dtype,
    options: MergeOptions = UNCHANGED,
    *,
    observe: Observer | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As :func:`merged_tensors`, under the names that the tensors have in the transformers model itself."""
    for entry in _entries(model, options):
        tensor = entry.value(dtype)
        if observe is not None and entry.layer is not None:
            observe(entry.name.removesuffix(".weight"), entry.layer, tensor)
        yield entry.name, tensor


@dataclass(frozen=True)
class _Entry:
    """One tensor of the merged model: its name, how to compute it, and the LoRA layer whose weight it is, if any."""

    name: str
    value: Callable[[torch.dtype], torch.Tensor]
    layer: LoraLayer | None = None


def _entries(model: torch.nn.Module, options: MergeOptions) -> Iterator[_Entry]:
    """The tensors of the merged model in the order of its modules; nothing is computed yet."""
    inner = transformers_model(model)
    check_adapters(model, options)
    wrapped: list[str] = []  # paths of the wrappers, whose inner modules are dealt with there
    seen: set[int | None] = set()  # parameters already yielded
    for path, module in inner.named_modules():
        if any(path.startswith(prefix) for prefix in wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped.append(f"{path}.")
        for key, entry in _of_module(path, module, options):
            if key is None or key not in seen:
                seen.add(key)
                yield entry


def check_adapters(model: torch.nn.Module, options: MergeOptions) -> None:
    """Raise :class:`AdapterError` or :class:`ExportError` for adapters that there are not, or that cannot be merged."""
    if isinstance(model, PeftModel):
        chosen = model.active_adapters if options.adapters is None else options.adapters
        unknown = [name for name in chosen if name not in model.peft_config]
        if unknown:
            raise AdapterError(
                "the model has no such adapter", got=unknown[0], do=f"It has: {', '.join(model.peft_config)}."
            )
        prompts = [model.peft_config[name] for name in chosen if model.peft_config[name].is_prompt_learning]
        if prompts:
            raise ExportError("a prompt-learning adapter cannot be merged", got=prompts[0].peft_type)
    elif options.adapters is not None:
        raise AdapterError("the model has no adapter", got=list(options.adapters))


def _of_module(path: str, module: torch.nn.Module, options: MergeOptions) -> Iterator[tuple[int | None, _Entry]]:
    """The module's own tensors, each with what identifies it where it is tied to another; None for a new one."""
    if isinstance(module, ModulesToSaveWrapper):
        yield from _trained_in_full(path, module, options)
    elif isinstance(module, ParamWrapper):
        yield from _of_parameters(path, module, options)
    elif isinstance(module, LoraLayer):
        yield from _of_lora(path, module, options)
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ExportError(f"the adapter at {path} cannot be merged", got=type(module).__name__)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            quantized = type(parameter).__name__ in _DEQUANTIZE
            value = partial(_values, module) if quantized else parameter.detach
            yield id(parameter), _plain(_join(path, name), value)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield id(buffer), _plain(_join(path, name), buffer.detach)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(name: str, value: Callable[[], torch.Tensor]) -> _Entry:
    def compute(dtype: torch.dtype) -> torch.Tensor:
        tensor = value()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            _check_finite(tensor, name)
        return tensor.cpu().contiguous()

    return _Entry(name, compute)


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    # In blocks: the test makes copies of what it looks at.
    if not all(bool(torch.isfinite(block).all()) for block in tensor.reshape(-1).split(_BLOCK)):
        raise ExportError(f"the merged weight {name} has values that are not finite in {tensor.dtype}")


def _weights_of(module: Any, held: Any, options: MergeOptions) -> dict[str, float]:
    """Weight of each chosen adapter that ``module`` has (those in ``held``), by name."""
    chosen = options.adapters
    if chosen is None:
        chosen = dict.fromkeys(module.active_adapters, 1.0)
    return {name: weight for name, weight in chosen.items() if name in held}


def _trained_in_full(
    path: str, module: ModulesToSaveWrapper, options: MergeOptions
) -> Iterator[tuple[int | None, _Entry]]:
    """Tensors of a module that was trained itself: as trained, or averaged with the original."""
    weights = _weights_of(module, module.modules_to_save, options)
    if options.adapters is None:  # as PEFT computes
        weights = dict(list(weights.items())[:1])
    shares = {name: (1 - options.base_weight) * weight for name, weight in weights.items()}
    first = next(iter(shares), None)
    trained = module.original_module if first is None else module.modules_to_save[first]
    for name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
        value = tensor.detach
        if shares and list(shares.values()) != [1.0] and tensor.is_floating_point():
            value = partial(_averaged, module, name, shares)
        yield id(tensor), _plain(_join(path, name), value)


def _averaged(module: ModulesToSaveWrapper, name: str, shares: Mapping[str, float]) -> torch.Tensor:
    """A weight moved from its original value towards the trained ones, in float32."""
    base = module.original_module.state_dict()[name].float()
    result = base.clone()
    for adapter, share in shares.items():
        result += share * (module.modules_to_save[adapter].state_dict()[name].to(base) - base)
    return result


def _of_lora(path: str, module: LoraLayer, options: MergeOptions) -> Iterator[tuple[int | None, _Entry]]:
    base = module.get_base_layer()
    quantized = type(getattr(base, "weight", None)).__name__ in _DEQUANTIZE
    if module.merged and quantized:
        raise ExportError(
            f"the adapter at {path} is already merged into quantized weights, which lost precision by it",
            do="Call model.unmerge_adapter(), or load the adapter again, and save then.",
        )
    if module.merged and options != UNCHANGED:
        raise ExportError(f"the adapter at {path} is already merged", do="Call model.unmerge_adapter() first.")
    name = _join(path, "weight")
    yield None, _Entry(name, lambda dtype: merged_weight(module, dtype, options, name=name), module)
    if getattr(base, "bias", None) is not None:
        yield None, _plain(_join(path, "bias"), partial(merged_bias, module, options))
    elif any(module.lora_bias.get(adapter) for adapter in factors(module, options)):
        raise ExportError(f"the adapter at {path} has a bias, and the layer that it adapts has none")


def _of_parameters(path: str, module: ParamWrapper, options: MergeOptions) -> Iterator[tuple[int | None, _Entry]]:
    """Tensors of a module whose parameters (such as the experts of a layer) have adapters, one wrapper each."""
    wrappers: dict[str, ParamWrapper] = {}
    inner = module
    while isinstance(inner, ParamWrapper):
        wrappers[inner.parameter_name] = inner
        inner = inner.base_layer
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        full = _join(path, name)
        if name in wrappers:
            yield None, _Entry(full, partial(_merged_parameter, wrappers[name], options, full))
        else:
            yield id(tensor), _plain(full, tensor.detach)


def _merged_parameter(module: ParamWrapper, options: MergeOptions, name: str, dtype: torch.dtype) -> torch.Tensor:
    return merged_weight(module, dtype, options, name=name)


@torch.no_grad()
def merged_bias(module: LoraLayer, options: MergeOptions = UNCHANGED) -> torch.Tensor:
    """The float32 bias that a LoRA layer with a bias amounts to, on the layer's device."""
    result = module.get_base_layer().bias.detach().float().clone()
    shares = {} if module.merged else factors(module, options)
    for adapter, factor in shares.items():
        if module.lora_bias.get(adapter):
            result += factor * module.scaling[adapter] * module.lora_B[adapter].bias.detach().float()
    return result


def factors(module: LoraLayer, options: MergeOptions) -> dict[str, float]:
    """What the change of each of the layer's adapters is multiplied by, by the adapter's name."""
    held = {*module.lora_A, *module.lora_embedding_A}
    factor = (1 - options.base_weight) * options.adapter_scale
    return {name: weight * factor for name, weight in _weights_of(module, held, options).items()}


@torch.no_grad()
def merged_weight(
    module: LoraLayer,
    dtype: torch.dtype = torch.float32,
    options: MergeOptions = UNCHANGED,
    *,
    name: str = "weight",
) -> torch.Tensor:
    """The weight that a LoRA layer amounts to, on the CPU, summed in float32 and rounded once.

    Args:
        module: The layer.
        dtype: Of the result.
        options: Which adapters, and how much of them.
        name: For the error message.

    Raises:
        ExportError: The result has values that are not finite.
    """
    base = module.get_param().detach() if isinstance(module, ParamWrapper) else _values(module.get_base_layer())
    shares = {} if module.merged else factors(module, options)
    changes = [_change(module, adapter, factor, base) for adapter, factor in shares.items()]
    result = torch.empty(base.shape, dtype=dtype)
    step = max(1, _BLOCK // max(1, base[0].numel()))
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        block = base[rows].float()
        for change in changes:
            block = block + change(rows)
        rounded = block.to(dtype)
        _check_finite(rounded, name)
        result[rows] = rounded
    return result


def _change(module: LoraLayer, adapter: str, factor: float, base: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """A function from a range of rows to the change that the adapter makes to them, in float32."""
    scale = factor * module.scaling[adapter]
    variant = module.lora_variant.get(adapter)
    if variant is not None:
        whole = variant.merge_safe(module, adapter, base.float().clone()) - base.float()
        return lambda rows: factor * whole[rows].float()
    if isinstance(module, ParamWrapper) and module.num_experts > 1:
        return partial(_experts_change, module, adapter, scale)
    if adapter in module.lora_A and base.ndim == 2 and not getattr(module, "fan_in_fan_out", False):
        down, up = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        return lambda rows: scale * (up[rows] @ down)
    if adapter in module.lora_embedding_A:
        first, second = module.lora_embedding_A[adapter].float(), module.lora_embedding_B[adapter].float()
        return lambda rows: scale * (first[:, rows].T @ second.T)
    delta = module.get_delta_weight(adapter).float()  # type: ignore[operator]
    return lambda rows: factor * delta[rows]


def _experts_change(module: ParamWrapper, adapter: str, scale: float, experts: slice) -> torch.Tensor:
    """The change [experts, ...] of stacked matrices, whose adapters PEFT keeps as A [E * r, in] and B [out, r * E]."""
    down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    down = down.reshape(module.num_experts, -1, down.shape[-1])[experts].float()
    up = up.reshape(up.shape[0], -1, module.num_experts)[:, :, experts].float()
    change = scale * torch.einsum("ore,eri->eoi", up, down)
    return change if module._did_swap_in_out_features else change.transpose(1, 2)


def _values(module: torch.nn.Module) -> torch.Tensor:
    """The module's weight, dequantized if it is quantized."""
    dequantize = _DEQUANTIZE.get(type(module.weight).__name__)
    return (dequantize(module) if dequantize else module.weight).detach()
