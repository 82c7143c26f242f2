"""Which layers of separate functions keep what their backward reads, where others compute it again.

What such a layer keeps is not known from its shapes, but can be seen: the last one keeps its values from the first pass
on, which costs nothing, since its backward comes first. When a whole step of the optimizer has been seen and a pass
after it (gradients, optimizer states and logits are there then), as many of the last layers keep theirs as there is
room for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from unsloth.memory.budget import Budget
from unsloth.memory.checkpointing import Policy
from unsloth.memory.gauge import Gauge, Room


class Chooser:
    """For the layers of one model.

    Args:
        layers: How many there are.
        gauge: Of the device's memory.
    """

    def __init__(self, layers: int, gauge: Gauge | None = None) -> None:
        self.layers = layers
        self._gauge = gauge or Gauge()
        self._anywhere = gauge is not None
        self._per_token: float | None = None
        self._tokens = 0
        self._kept = 1
        self._stepped = 0

    def keeps(self, layer: int, policy: Policy, x: torch.Tensor, trained: torch.nn.Parameter | None) -> bool:
        """Whether ``layer``, from 0, keeps its values in this call; what the pass does is decided when the first asks.

        Args:
            layer: Which.
            policy: Of the layer.
            x: Its input (B, T, K).
            trained: A weight that is trained: without a gradient, a step of the optimizer is over.
        """
        if policy is True or policy is False or not (x.is_cuda or self._anywhere) or _in_backward():
            return False
        if layer == 0:
            self._begin(policy, x, trained is not None and trained.grad is None)
        return layer >= self.layers - self._kept

    @contextlib.contextmanager
    def keeping(self, layer: int, x: torch.Tensor) -> Iterator[None]:
        """Have what is saved for the backward in this block kept, whoever would have it computed again."""
        before = self._gauge.allocated(x.device)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same):
            yield
        if layer == self.layers - 1 and self._tokens:
            self._per_token = (self._gauge.allocated(x.device) - before) / self._tokens

    def _begin(self, policy: Policy, x: torch.Tensor, without_gradient: bool) -> None:
        tokens = x.shape[:-1].numel()
        if self._tokens:
            self._gauge.learn(x.device, self._tokens, self._bytes(self._tokens) * self._kept)
            # the pass that follows the first step shows what there is from then on
            self._stepped += 1 if self._stepped else int(without_gradient)
        self._tokens = tokens
        room = self._gauge.room(x.device, tokens, 0, 0)
        if isinstance(policy, Budget) and policy.device is not None:
            room = Room(policy.device, room.known)
        known = self._per_token is not None and room.known and self._stepped > 1
        self._kept = min(self.layers, max(1, room.size // max(1, self._bytes(tokens)))) if known else 1

    def _bytes(self, tokens: int) -> int:
        return int((self._per_token or 0) * tokens)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _in_backward() -> bool:
    """Whether a layer is being computed again."""
    return torch._C._current_graph_task_id() != -1
