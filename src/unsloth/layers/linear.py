"""Linear layers, with or without an adapter of PEFT, read for the ops that multiply several at once.

The modules stay where they are, with their parameters; :func:`read` only looks at them. Mathematics and gradients
are in :mod:`unsloth.kernels.lora_linear`: ``y = x W^T + scale (x A^T) B^T + bias``. A quantized weight is
dequantized for the product, thrown away, and dequantized again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from unsloth.kernels.lora_linear import lora_linears, product_dtype
from unsloth.kernels.lora_weights import Adapter, PaddedWeight, Weight
from unsloth.layers.fast import Fast, is_untouched
from unsloth.quant import nf4

FEW_TOKENS = 64
"""Without gradients, taking several products together pays from about this many tokens on."""

_TRAINED = "weights that are trained"
_LORA = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}


@dataclass(frozen=True, slots=True)
class Frozen:
    """A linear layer as a product needs it, frozen but where the caller trains weights itself.

    Attributes:
        base: The ``nn.Linear`` or bitsandbytes' ``Linear4bit`` that holds weight and bias.
        adapter: What is added to it, or None.
        quantized: Whether ``base`` is a ``Linear4bit``.
    """

    base: torch.nn.Module
    adapter: Adapter | None
    quantized: bool

    @property
    def bias(self) -> torch.Tensor | None:
        """(out,) or None."""
        return self.base.bias

    @property
    def trained(self) -> bool:
        """Whether weight or bias is."""
        return self.base.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which tensors frozen layers are made of, to ask later whether they still are.

    Attributes:
        key: Equal for the same tensors at the same places.
        objects: Keeps them alive, without which others could take their places.
    """

    key: tuple
    objects: tuple

    @classmethod
    def of(cls, linears: Sequence[Frozen]) -> Identity:
        """Of the weights of ``linears`` as they are now."""
        weights = [linear.base.weight for linear in linears]
        states = [getattr(weight, "quant_state", None) for weight in weights]
        key = tuple((id(w), w.data_ptr(), w._version, id(s)) for w, s in zip(weights, states, strict=True))
        return cls(key, (*weights, *states))


def read(module: torch.nn.Module, *, trained: bool = False) -> Frozen | str:
    """The layer that ``module`` amounts to in this very call, or why it must be called itself.

    ``trained`` takes weights that are trained, in layers without adapters, for a caller that makes their gradients.
    """
    if not is_untouched(module):
        return "hooks on a linear layer"
    found = read_called(module)
    plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
    return Frozen(module, None, quantized=False) if trained and plain and found == _TRAINED else found


def read_called(module: torch.nn.Module) -> Frozen | str:
    """As :func:`read`, of a module that is being called, so that hooks on it are no obstacle."""
    if not isinstance(module, LoraLayer):
        return _read_base(module, None)
    if (type(module).__module__, type(module).__name__) not in _LORA:
        return f"an adapter on {type(module.get_base_layer()).__name__}"
    if module.merged:
        return "a merged adapter"
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > 1:
        return "several active adapters"
    if not names:
        return _read_base(module.base_layer, None)
    reason = _peculiarity(module, names[0])
    if reason is not None:
        return reason
    a, b = module.lora_A[names[0]], module.lora_B[names[0]]
    return _read_base(module.base_layer, Adapter(a.weight, b.weight, module.scaling[names[0]]))


def _peculiarity(module: Any, name: str) -> str | None:
    """What the adapter called ``name`` has that the product does not know, or None."""
    if name in module.lora_variant:
        return "DoRA or another variant of LoRA"
    if module.lora_bias.get(name):
        return "an adapter with a bias"
    dropout = module.lora_dropout[name]
    if module.training and getattr(dropout, "p", 0):
        return "dropout on the adapter's input"
    if module.fan_in_fan_out:
        return "a transposed weight"
    parts = (module.lora_A[name], module.lora_B[name])
    if any(type(part) is not torch.nn.Linear for part in parts):
        return "an adapter that is not made of plain linear layers"
    if not all(is_untouched(part) for part in (*parts, dropout)):
        return "hooks on an adapter"
    return None


def _read_base(base: torch.nn.Module, adapter: Adapter | None) -> Frozen | str:
    quantized = type(base).__name__ == "Linear4bit"
    if type(base) is not torch.nn.Linear and not quantized:
        return f"a layer of the class {type(base).__name__}"
    if not is_untouched(base):
        return "hooks on a linear layer"
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return _TRAINED
    if quantized:
        state = getattr(weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", None) or tuple(state.shape) != _shape(base):
            return "a 4-bit weight in another layout"
    elif type(weight) is not torch.nn.Parameter:
        return f"a weight of the class {type(weight).__name__}"
    return Frozen(base, adapter, quantized)


def _shape(base: Any) -> tuple[int, int]:
    return base.out_features, base.in_features


def read_all(modules: Sequence[torch.nn.Module], x: torch.Tensor, *, trained: bool = False) -> list[Frozen] | str:
    """Every module read for a product with ``x`` (..., K), or why they must be called one by one."""
    return _fitting([read(module, trained=trained) for module in modules], x)


def _fitting(linears: Sequence[Frozen | str], x: torch.Tensor) -> list[Frozen] | str:
    found: list[Frozen] = []
    dtype = product_dtype(x)
    for linear in linears:
        if isinstance(linear, str):
            return linear
        # Linear4bit multiplies in a dtype of its own, whatever autocast says
        if linear.quantized and linear.base.compute_dtype not in (None, dtype):
            return "a 4-bit layer that computes in another dtype"
        found.append(linear)
    if not torch.is_grad_enabled() and x.numel() < FEW_TOKENS * x.shape[-1]:
        return "few tokens"
    return found


def weights_of(linears: Sequence[Frozen], dtype: torch.dtype, outs: Sequence[int] | None = None) -> list[Weight]:
    """The weights of ``linears`` as the products take them.

    Args:
        linears: Layers of one input.
        dtype: Of the product.
        outs: Output features to tell the products of, where they differ from those of ``linears`` (a fused layer
            taken apart).
    """
    ranks = [0 if linear.adapter is None else linear.adapter.rank for linear in linears]
    sizes = tuple(outs or (linear.base.out_features for linear in linears))
    if all(linear.quantized for linear in linears) and sum(ranks) > 0:
        # a fused layer's adapter is taken apart into one a part, each of the whole rank
        rank = sum(ranks) * (len(sizes) // len(linears))
        return [partial(_dequantized, [linear.base for linear in linears], sizes, rank, dtype)]
    weights = [_weight(linear, dtype) for linear in linears]
    if outs is None:
        return weights
    return [partial(_part, weights[0], start, size) for start, size in _spans(sizes)]


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _weight(linear: Frozen, dtype: torch.dtype) -> torch.Tensor | Callable[[], torch.Tensor]:
    if linear.quantized:
        return partial(_dequantized_alone, linear.base, dtype)
    weight = linear.base.weight
    return weight if weight.dtype == dtype else partial(_cast, weight, dtype)


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.detach().to(dtype)


def _part(weight: Any, start: int, size: int) -> torch.Tensor:
    whole = weight() if callable(weight) else weight.detach()
    return whole[start : start + size]


def _dequantized_alone(base: Any, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(_shape(base), dtype=dtype, device=base.weight.device)
    return nf4.dequantize_into(base, out)


def _dequantized(bases: Sequence[Any], outs: tuple[int, ...], rank: int, dtype: torch.dtype) -> PaddedWeight:
    device = bases[0].weight.device
    padded = PaddedWeight.empty(outs, bases[0].in_features, rank, dtype=dtype, device=device)
    for base, (start, size) in zip(bases, _spans([b.out_features for b in bases]), strict=True):
        nf4.dequantize_into(base, padded.weight[start : start + size])
    return padded


def multiply(linears: Sequence[Frozen], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(..., out_i) of every layer; see :func:`unsloth.kernels.lora_linear.lora_linears`."""
    weights = weights_of(linears, product_dtype(x))
    whole: Any = weights[0] if len(weights) < len(linears) else weights
    return lora_linears(x, whole, [linear.adapter for linear in linears], [linear.bias for linear in linears])


def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A PEFT layer's forward with base product, adapter and input gradient in as few products as they take.

    Args:
        self: The PEFT layer.
        x: (..., in).
        *args: Given by nobody today; any makes the original forward run.
        **kwargs: Such as ``adapter_names``, likewise.

    Returns:
        (..., out) in autocast's dtype where that is on, else in that of ``x``.
    """
    if torch.compiler.is_compiling():
        return type(self).forward(self, x, *args, **kwargs)
    fast: Fast = self.unsloth_fast
    if args or any(value is not None for value in kwargs.values()):
        return fast.decline(self, "arguments for PEFT", x, *args, **kwargs)
    linears = _fitting([read_called(self)], x)
    if isinstance(linears, str):
        return fast.decline(self, linears, x)
    fast.took()
    return multiply(linears, x)[0]
