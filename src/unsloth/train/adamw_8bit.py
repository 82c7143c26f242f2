"""The optimizer behind ``optim="adamw_8bit"`` on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map

from unsloth.kernels import adamw_8bit as kernel

_SMALLEST = 4096
"""Tensors with fewer values keep their moments in float32, as in bitsandbytes: there is nothing to save."""

_STATE = ("step", "state1", "state2", "absmax1", "absmax2")
_NESTED = "__bnb_optimizer_quant_state__"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take one byte a value each (:mod:`unsloth.kernels.adamw_8bit`), in one launch a step.

    States have the names and the layout of ``bitsandbytes.optim.AdamW8bit``.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        tables = [create_dynamic_map(signed=signed) for signed in (True, False)]
        self._codes = torch.stack(tables).to(torch.float32)
        self._launches: dict[tuple[int, ...], kernel.Launch] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (step, *_), parameters in self._batches(group).items():
                self._update(group, step, parameters)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, of this class or of ``bitsandbytes.optim.AdamW8bit``."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            # torch has converted all of it to the parameter's dtype; bitsandbytes nests what it does not want converted
            saved = dict(state_dict["state"].get(number, {}))
            saved |= saved.pop(_NESTED, {})
            self.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, torch.Tensor) else value
                for name, value in saved.items()
                if name in _STATE
            }

    def _batches(self, group: dict[str, Any]) -> dict[tuple[Any, ...], list[torch.Tensor]]:
        """The group's parameters, by what one launch can take together; their step counters go up by one."""
        batches = defaultdict(list)
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                self._start(parameter, state)
            state["step"] += 1
            eight_bit = state["state1"].dtype is torch.uint8
            kind = (int(state["step"]), eight_bit, parameter.device, parameter.dtype, gradient.dtype)
            batches[kind].append(parameter)
        return batches

    @staticmethod
    def _start(parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        small = parameter.numel() < _SMALLEST
        for name in ("state1", "state2"):
            state[name] = torch.zeros_like(
                parameter, dtype=torch.float32 if small else torch.uint8, memory_format=torch.contiguous_format
            )
        if not small:
            blocks = -(-parameter.numel() // kernel.BLOCK)
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)

    def _update(self, group: dict[str, Any], step: int, parameters: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        settings = kernel.AdamWStep(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad.contiguous() for parameter in parameters]  # type: ignore[union-attr]
        if states[0]["state1"].dtype == torch.uint8:
            device = parameters[0].device
            self._codes = self._codes.to(device)
            key = tuple(map(id, parameters))
            if device.type == "cuda" and key not in self._launches:
                self._launches[key] = kernel.Launch(parameters, self._codes)
            moments = [kernel.Moments(s["state1"], s["state2"], s["absmax1"], s["absmax2"]) for s in states]
            kernel.adamw_8bit(parameters, gradients, moments, self._codes, settings, launch=self._launches.get(key))
            return
        # small tensors, such as the weights of norms, as one: a dozen launches each would take longer than all others
        changed = [parameters, [s["state1"] for s in states], [s["state2"] for s in states]]
        whole, gradient, m, v = (
            torch.cat([t.flatten() for t in tensors]) for tensors in (changed[0], gradients, *changed[1:])
        )
        kernel.adamw_reference(whole, gradient, m, v, settings)
        sizes = [parameter.numel() for parameter in parameters]
        for tensors, values in zip(changed, (whole, m, v), strict=True):
            pieces = zip(values.split(sizes), tensors, strict=True)
            torch._foreach_copy_(tensors, [piece.view(tensor.shape) for piece, tensor in pieces])
