"""Logits that are not computed until something asks for their values.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from unsloth.core.errors import TrainingError

_Step = Callable[[torch.Tensor], torch.Tensor]

# What the wrapper itself can answer, since its shape, dtype and device are those of the logits.
_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
}
_TIMES = {torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul, torch.multiply}
_DIVIDED = {torch.Tensor.div, torch.Tensor.__truediv__, torch.div, torch.true_divide, torch.Tensor.true_divide}
_TANH = {torch.Tensor.tanh, torch.tanh}
_FLOAT = {torch.Tensor.float}
_CONTIGUOUS = {torch.Tensor.contiguous}


@dataclass
class Origin:
    """Where lazy logits come from: ``compute(hidden)``, as it would have run where the head was called.

    Attributes:
        hidden: (B, T, D), what the head was called with.
        linear: The layer that the head runs; its weight (V, D) is watched for changes.
        compute: The head's own forward.
        version: Of the weight when the head was called; None where torch keeps no count.
        grad: Whether gradients were recorded then.
        autocast: The dtype of autocast then, or None.
    """

    hidden: torch.Tensor
    linear: nn.Linear
    compute: _Step
    version: int | None = field(init=False)
    grad: bool = field(init=False)
    autocast: torch.dtype | None = field(init=False)

    def __post_init__(self) -> None:
        weight = self.linear.weight
        self.version = None if weight.is_inference() else weight._version
        self.grad = torch.is_grad_enabled()
        device = self.hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's product."""
        return self.autocast or self.hidden.dtype

    def logits(self) -> torch.Tensor:
        """The head's product, (B, T, V), with the gradient and autocast modes of the call."""
        if self.version is not None and self.linear.weight._version != self.version:
            raise TrainingError(
                "the logits of this output were not computed, and the output head has changed since",
                do="Pass return_logits=True to the model, or use the logits before the optimizer's step.",
            )
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(self.hidden.device.type, dtype=self.autocast)
        with torch.set_grad_enabled(self.grad), autocast:
            return self.compute(self.hidden)


class LazyLogits(torch.Tensor):
    """A tensor of logits (B, T, V) that holds the hidden states they are made from.

    It remembers multiplications and divisions by a number, ``tanh``, ``float()`` and ``contiguous()``. Any other use
    computes the logits, once, and goes on with them, as if they had been there from the start. A loss that can do
    without them takes :attr:`origin` and :meth:`scale_and_cap`.

    Attributes:
        origin: The hidden states and the head.
        correct: Set by a loss: the number of trained positions that were predicted right.
    """

    origin: Origin
    correct: torch.Tensor | None
    _steps: tuple[tuple[str, float, _Step], ...]
    _real: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, origin: Origin, steps: tuple[tuple[str, float, _Step], ...] = (), dtype: torch.dtype | None = None
    ) -> LazyLogits:
        """A tensor without storage, of the shape that the logits will have."""
        shape = (*origin.hidden.shape[:-1], origin.linear.out_features)
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or origin.dtype, device=origin.hidden.device, requires_grad=False
        )
        self.origin, self._steps, self.correct, self._real = origin, steps, None, None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record what can be recorded; answer what is known; compute the logits for everything else."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        recorded = _record(func, args, kwargs)
        if recorded is not None:
            return recorded
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached only by code that goes round torch's Python functions; gradients would be lost here."""
        raise TrainingError(
            f"{func} was given logits that were not computed",
            do="Pass return_logits=True to the model, or set UNSLOTH_RETURN_LOGITS=1.",
        )

    @property
    def is_pending(self) -> bool:
        """Whether nothing has asked for the values yet."""
        return self._real is None

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor; computed on the first call."""
        if self._real is None:
            real = self.origin.logits()
            with torch.set_grad_enabled(self.origin.grad):
                for _, _, step in self._steps:
                    real = step(real)
            self._real = real
        return self._real

    def scale_and_cap(self) -> tuple[float, float] | None:
        """``(scale, cap)`` such that the logits are ``cap * tanh(scale * r / cap)`` of the head's product ``r``.

        A cap of 0 stands for no cap: ``scale * r``. None if what was recorded has no such form.
        """
        before, after, capped = 1.0, 1.0, False
        for kind, factor, _ in self._steps:
            if kind == "tanh":
                if capped:
                    return None
                capped = True
            elif capped:
                after *= factor
            else:
                before *= factor
        if not capped:
            return before, 0.0
        return (before * after, after) if after > 0 else None


def _record(func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """Lazy logits that remember ``func``; None if it is not one of those that are remembered."""
    if kwargs or not args:
        return None
    numbers = [a for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
    lazy = next((a for a in args if isinstance(a, LazyLogits)), None)
    if lazy is None or not lazy.is_pending or len(args) != len(numbers) + 1:
        return None
    step = _step(func, numbers, lazy is args[0])
    if step is None:
        return None
    recorded = LazyLogits(lazy.origin, (*lazy._steps, step), torch.float32 if step[0] == "float" else lazy.dtype)
    if step[0] in ("float", "contiguous"):  # as accelerate does with every output: the same predictions
        recorded.correct = lazy.correct
    return recorded


def _step(func: Any, numbers: list[float], lazy_first: bool) -> tuple[str, float, _Step] | None:
    if func in _TIMES and len(numbers) == 1:
        return "scale", float(numbers[0]), _Times(numbers[0])
    if func in _DIVIDED and len(numbers) == 1 and lazy_first and numbers[0] != 0:
        return "scale", 1.0 / numbers[0], _Divided(numbers[0])
    if func in _TANH and not numbers:
        return "tanh", 1.0, torch.tanh
    if func in _FLOAT and not numbers:
        return "float", 1.0, torch.Tensor.float
    if func in _CONTIGUOUS and not numbers:
        return "contiguous", 1.0, torch.Tensor.contiguous
    return None


@dataclass(frozen=True)
class _Times:
    factor: float

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.factor


@dataclass(frozen=True)
class _Divided:
    divisor: float

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / self.divisor
