"""A model's own layers, read for generation: the live tensors, whatever they are stored as.

Nothing is copied. A projection is the module that the model has at the place that its family's spec names; under a
layer of PEFT, the layer below it, whose adapter :mod:`unsloth.generate.adapter_bank` applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.nn.functional import linear

from unsloth.core.errors import PlanError
from unsloth.kernels.nf4 import NF4Weight, dequantize_nf4
from unsloth.kernels.nf4_matmul import nf4_linear
from unsloth.quant import nf4

# Layers of PEFT whose adapters are two linear layers on the input, added to the output.
_PLAIN_LORA = {"Linear", "Linear4bit", "Linear8bitLt"}


@dataclass(frozen=True)
class Projection:
    """One linear layer.

    Attributes:
        path: Of the module, in the transformers model.
        module: The layer without its adapter.
        lora: The layer of PEFT around it, or None.
        packed: Its weight if that is four bits wide.
        opaque: Whether only the module itself knows how to multiply by its weight.
        native: Whether the module multiplies faster than our reference: four bits on a CPU, where bitsandbytes has
            code for the processor.
    """

    path: str
    module: Any
    lora: Any
    packed: NF4Weight | None
    opaque: bool
    native: bool = False

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.module.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.module.out_features

    @property
    def stored(self) -> NF4Weight | torch.Tensor | None:
        """Its weight as :mod:`unsloth.kernels.decoding_linears` takes it; None where only the module knows it."""
        return self.packed if self.packed is not None or self.opaque else self.module.weight

    def multiply(self, x: torch.Tensor, fast: bool = True) -> torch.Tensor:
        """(T, in) to (T, out), bias included, in the dtype of ``x``."""
        if self.opaque or (fast and self.native):
            return self.module(x).to(x.dtype)
        if self.packed is not None:
            return self.add_bias(nf4_linear(x, self.packed, fast=fast))
        weight, bias = self.module.weight, self.module.bias
        if weight.dtype == x.dtype:
            return linear(x, weight, bias)
        return linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def multiply_onto(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``y`` (T, out) plus what :meth:`multiply` gives, for many rows; changes ``y``.

        The product itself adds ``y`` as it writes, which spares a pass over the output.
        """
        if self.opaque or self.native or (self.packed is None and self.module.weight.dtype != y.dtype):
            return y.add_(self.multiply(x))
        weight = self.module.weight if self.packed is None else dequantize_nf4(self.packed, dtype=x.dtype)
        return self.add_bias(y.addmm_(x, weight.t()))

    def add_bias(self, y: torch.Tensor) -> torch.Tensor:
        """``y`` with the layer's bias, if it has one; may change ``y``."""
        return y if self.module.bias is None else y.add_(self.module.bias)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that a product reads."""
        yield from self.module.parameters(recurse=False)
        if self.packed is not None:
            yield from (self.packed.packed, self.packed.absmax)


def read_projection(model: torch.nn.Module, path: str, biased: bool | None = None) -> Projection:
    """The projection at ``path``.

    Args:
        model: The transformers model.
        path: Of the module.
        biased: Whether the spec says that it has a bias; None: it may have one.

    Raises:
        PlanError: It cannot be computed without calling the model; the message says why.
    """
    module = saved_module(model.get_submodule(path))
    lora = None
    if isinstance(module, LoraLayer):
        lora, module = module, module.get_base_layer()
        if type(lora).__name__ not in _PLAIN_LORA:
            raise PlanError("the engine cannot apply this adapter", got=f"{type(lora).__name__} at {path}")
    if not hasattr(module, "in_features"):
        raise PlanError("the engine knows no such layer", got=f"{type(module).__name__} at {path}")
    if biased is not None and (module.bias is not None) != biased:
        raise PlanError("a bias is not where the family's spec has it", got=path)
    if any(p.is_meta for p in module.parameters(recurse=False)):
        raise PlanError("a weight is not in memory (offloaded)", got=path)
    state = getattr(module.weight, "quant_state", None)
    if type(module).__name__ == "Linear4bit" and state is not None:
        packed = NF4Weight.from_quant_state(module.weight, state)
        nf4.keep_layout(module)
        return Projection(path, module, lora, packed, opaque=False, native=module.weight.device.type == "cpu")
    return Projection(path, module, lora, None, opaque=type(module) is not torch.nn.Linear)


def saved_module(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, or its trained copy that is active (PEFT's ``modules_to_save``).

    Raises:
        PlanError: It is wrapped in another way.
    """
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        if module.disable_adapters or not active or active[0] not in module.modules_to_save:
            return module.original_module
        return module.modules_to_save[active[0]]
    if type(module).__module__.startswith("peft.") and not isinstance(module, LoraLayer):
        raise PlanError("the engine cannot apply this adapter", got=type(module).__name__)
    return module


def storage_key(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Changes whenever one of the tensors moves."""
    return tuple(tensor.data_ptr() for tensor in tensors)
