"""Gradients of a block's own weights (not its adapters'), made where its backward has what they are products of.

    y = x W^T + b:      dW = g^T x      db = sum of g over the tokens

Where the tokens come in tiles, sums over them are float32 and rounded once at the end; a single tile is one product,
whose sums are float32 inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unsloth.kernels.dispatch import compute_dtype
from unsloth.kernels.head_chunks import matmul_into


class OwnGradients:
    """Of the weights of one block.

    Args:
        weights: Weight and bias of every linear layer, those of norms after them; None where there is none.
        needs: Whether each wants a gradient.
        room: (numbers,) Where those of matrices are to be, one behind the other; None allocates.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor | None], needs: Sequence[bool], room: torch.Tensor | None = None
    ) -> None:
        self.weights, self.needs, self._room = weights, needs, room
        self._found: list[torch.Tensor | None] = [None] * len(weights)

    def add_linear(self, number: int, g: torch.Tensor, x: torch.Tensor, *, tiles: int = 1) -> None:
        """Take in tokens of linear layer ``number``: the gradient ``g`` (M, out) of its output, its input (M, in)."""
        weight, bias = 2 * number, 2 * number + 1
        if self.needs[weight]:
            into = self._found[weight]
            summed = into if into is not None else self._place(weight, tiles)
            matmul_into(summed, g.t(), x, accumulate=into is not None)
            self._found[weight] = summed
        if self.needs[bias]:
            more = g.sum(0, dtype=compute_dtype(g.dtype))
            into = self._found[bias]
            self._found[bias] = more if into is None else into.add_(more)

    def wants(self, number: int) -> bool:
        """Whether weight ``number`` (negative: from the end) wants a gradient."""
        return self.needs[number]

    def set(self, number: int, grad: torch.Tensor) -> None:
        """The gradient of weight ``number``, such as a norm's."""
        self._found[number] = grad

    def _place(self, number: int, tiles: int) -> torch.Tensor:
        """Where the gradient of weight ``number`` goes."""
        weight = self.weights[number]
        assert weight is not None
        if tiles > 1:
            return torch.empty(weight.shape, dtype=compute_dtype(weight.dtype), device=weight.device)
        if self._room is None:
            return torch.empty_like(weight, memory_format=torch.contiguous_format)
        before = zip(self.weights[:number], self.needs[:number], strict=True)
        start = sum(other.numel() for other, needed in before if needed and other is not None)
        return self._room[start : start + weight.numel()].view(weight.shape)

    def finished(self) -> list[torch.Tensor | None]:
        """In the order of the weights, at their dtypes."""
        return [
            None if grad is None or weight is None else grad.to(weight.dtype)
            for grad, weight in zip(self._found, self.weights, strict=True)
        ]
