"""The gated MLP of a decoder block: ``down(a(gate(x)) * up(x))``, three linear layers or two (gate and up in one).

Mathematics and gradients are in :mod:`unsloth.kernels.lora_mlp`. Kept for the backward are x, gate(x), up(x) and the
adapters' thin products; ``a(gate) * up`` is computed again. Shazeer, "GLU Variants Improve Transformer", 2020.

In float16, ``a(gate) * up`` can exceed 65,504 where neither factor does. It is then computed in float32 and divided by
a power of two before the last product, whose result is multiplied by it again, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unsloth.kernels.geglu import geglu
from unsloth.kernels.lora_linear import product_dtype
from unsloth.kernels.lora_mlp import lora_mlp
from unsloth.kernels.lora_weights import Adapter
from unsloth.kernels.swiglu import swiglu
from unsloth.layers.fast import Fast
from unsloth.layers.linear import Frozen, multiply, read_all, weights_of


@dataclass(frozen=True)
class MlpOptions:
    """What an MLP computes.

    Attributes:
        gate_up: Names of the two modules gate and up, or of the one that holds gate's rows, then up's.
        down: Name of the third.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
    """

    gate_up: tuple[str, ...]
    down: str
    activation: str


_LARGEST_FLOAT16 = 2.0**8
"""What the last product's input is scaled down to, so that its sums stay in range too; up to here nothing changes."""


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``a(gate) * up``, elementwise."""
    return swiglu(gate, up) if activation == "silu" else geglu(gate, up, tanh=activation == "gelu_tanh")


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of an MLP module: (..., K) to (..., H)."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
    fast: Fast = self.unsloth_fast
    options: MlpOptions = fast.options
    modules = [getattr(self, name) for name in (*options.gate_up, options.down)]
    narrow = torch.is_autocast_enabled(x.device.type) and product_dtype(x) == torch.float16
    if narrow and not _has_bias(modules[-1]):
        fast.took(but="float16: the product of gate and up is scaled")
        return _scaled(modules, x, options.activation)
    linears = read_all(modules, x)
    if isinstance(linears, str):
        fast.took(but=f"linear layers called one by one: {linears}")
        outputs = [module(x) for module in modules[:-1]]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return modules[-1](gated(gate, up, options.activation))
    fast.took()
    if any(linear.bias is not None for linear in linears):
        outputs = list(multiply(linears[:-1], x))
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return multiply(linears[-1:], gated(gate, up, options.activation))[0]
    return _whole(linears[:-1], linears[-1], x, options.activation)


def _has_bias(module: Any) -> bool:
    """Whether a linear layer, or the one below an adapter, adds a bias."""
    return getattr(getattr(module, "base_layer", module), "bias", None) is not None


def _scaled(modules: Sequence[torch.nn.Module], x: torch.Tensor, activation: str) -> torch.Tensor:
    """(..., H) in float32, of modules without a bias in the last; the products themselves are float16."""
    outputs = [module(x) for module in modules[:-1]]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    inner = gated(gate.float(), up.float(), activation)
    with torch.no_grad():
        over = (inner.abs().amax() / _LARGEST_FLOAT16).clamp(min=1.0)
        scale = torch.exp2(torch.log2(over).ceil())
    return modules[-1]((inner / scale).to(torch.float16)).float() * scale


def _whole(gate_up: Sequence[Frozen], down: Frozen, x: torch.Tensor, activation: str) -> torch.Tensor:
    dtype = product_dtype(x)
    outs = None if len(gate_up) == 2 else (gate_up[0].base.out_features // 2,) * 2
    weights = weights_of(gate_up, dtype, outs)
    whole: Any = weights[0] if len(weights) == 1 else weights
    adapters = [linear.adapter for linear in gate_up] if outs is None else _apart(gate_up[0].adapter, outs[0])
    return lora_mlp(x, whole, weights_of([down], dtype)[0], [*adapters, down.adapter], activation)


def _apart(adapter: Adapter | None, rows: int) -> list[Adapter | None]:
    """The adapter of a fused layer as two, of its first ``rows`` outputs and of the others, that share A."""
    if adapter is None:
        return [None, None]
    return [Adapter(adapter.a, b, adapter.scale) for b in (adapter.b[:rows], adapter.b[rows:])]
