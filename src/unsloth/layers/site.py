"""The linear layers of one input in a block, and where their dequantized weights are between calls."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from unsloth.kernels.lora_weights import LoraGroup, PaddedWeight
from unsloth.layers.linear import Frozen, Identity, weights_of


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that are multiplied together.

    Attributes:
        name: Of the site, within its block.
        linears: The layers.
        held: Dequantized weights that stay from call to call, by the name of their site, with what they are of; None if
            none do.
    """

    name: str
    linears: tuple[Frozen, ...]
    held: MutableMapping[str, tuple[Identity, PaddedWeight]] | None = None

    def group(self, dtype: torch.dtype, *, again: bool = True) -> LoraGroup:
        """The layers, ready to multiply.

        Args:
            dtype: Of the product.
            again: Whether to write the adapters beside held weights even if they seem to be there, see
                :meth:`unsloth.kernels.lora_weights.PaddedWeight.place`.
        """
        weights = weights_of(self.linears, dtype)
        adapters = [linear.adapter for linear in self.linears]
        if self.held is None:
            return LoraGroup(weights, adapters, dtype)
        # merging and unmerging an adapter makes other weights of the same layers
        now = Identity.of(self.linears)
        known, held = self.held.get(self.name, (None, None))
        if held is None or known is None or known.key != now.key or held.buffer.dtype != dtype:
            # without an adapter, layers are dequantized apart, and not held
            if len(weights) > 1 or not callable(weights[0]):
                return LoraGroup(weights, adapters, dtype)
            made = weights[0]()
            if not isinstance(made, PaddedWeight):
                return LoraGroup([made], adapters, dtype)
            held = made
            self.held[self.name] = now, held
        return LoraGroup([held], adapters, dtype, again=again)
