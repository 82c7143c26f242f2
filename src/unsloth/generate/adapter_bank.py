"""The adapters of an engine, side by side, so that one batch may hold rows of several.

For S adapters of rank at most R the matrices of a layer stand as one: A of shape (S R, in), B of shape (out, S R), each
B times its adapter's scale. With m the mask (T, S R) that is 1 where a column belongs to the row's adapter::

    y = x W^T + bias + (m * (x A^T)) B^T

A row without an adapter has a mask of zeros. With one adapter for all rows, or none, there is no mask. The few rows of
a decoding step go through products of four- or sixteen-bit weights that add the adapters' parts before they round, all
in one launch where the weights are alike. Where there are many rows, the adapter's part is made first, and the product
with W is added to it. The matrices are copies in the dtype of computation, made anew from the live tensors whenever
those have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from unsloth.core.errors import AdapterError
from unsloth.generate.weights import Projection
from unsloth.kernels.decoding_linears import (
    StackedAdapters,
    decoding_gate,
    decoding_linears,
    gates,
    joined_product,
)
from unsloth.kernels.geglu import geglu
from unsloth.kernels.lora_rows import ROWS, fits, gate_rows, lora_rows, low_rank, project_rows
from unsloth.kernels.nf4 import NF4Weight
from unsloth.kernels.side_by_side import side_by_side
from unsloth.kernels.swiglu import swiglu

_STEP = 16  # ranks are rounded up to it, so that rows stay aligned

Pair = tuple[torch.Tensor, torch.Tensor, float]
"""A (rank, in), B (out, rank), and the scale."""


@dataclass
class Selection:
    """Which adapter each row of a batch has.

    Attributes:
        used: Whether any row has one.
        mask: (T, S), 1 where the row has that adapter; None if there is only one and every row has it.
    """

    used: bool
    mask: torch.Tensor | None = None


NO_ADAPTERS = Selection(used=False)


@dataclass(eq=False)
class Site:
    """Projections of one input, with their adapters.

    Attributes:
        name: Where they are.
        projections: In the order of their outputs.
        a: (projections * S * R, in), or None while no adapter is here.
        b: (out, S * R) of each projection.
        stacked: The same as the kernels of few rows take it.
    """

    name: str
    projections: list[Projection]
    a: torch.Tensor | None = None
    b: list[torch.Tensor] = field(default_factory=list)
    stacked: StackedAdapters | None = None

    def __call__(self, x: torch.Tensor, adapters: Selection, fast: bool = True) -> list[torch.Tensor]:
        """(T, out) of each projection for ``x`` (T, in)."""
        weights, stacked, mask = self._joinable(adapters)
        if fast and weights and joined_product(x, weights, stacked, mask) is not None:
            outputs = decoding_linears(x, weights, stacked, mask)
            return [p.add_bias(y) for p, y in zip(self.projections, outputs, strict=True)]
        products = [partial(projection.multiply, x, fast) for projection in self.projections]
        if self.a is None or not adapters.used:
            return side_by_side(products, x.device)
        if fast and x.shape[0] > ROWS and x.dtype == self.a.dtype:
            parts = low_rank(x, self.a, len(self.b), adapters.mask)
            updates = [part @ b.t() for part, b in zip(parts, self.b, strict=True)]
            return [p.multiply_onto(y, x) for p, y in zip(self.projections, updates, strict=True)]
        low, outputs = None, []
        if fast and fits(x, self.a, self.b):
            low, *outputs = side_by_side([partial(project_rows, x, self.a), *products], x.device)
        else:
            outputs = side_by_side(products, x.device)
        lora_rows(x, self.a, self.b, outputs, adapters.mask, low=low, fast=fast)
        return outputs

    def gated(self, x: torch.Tensor, adapters: Selection, activation: str, fast: bool = True) -> torch.Tensor:
        """``act(gate) * up`` (T, out) of two projections, or of one with the rows of both."""
        weights, stacked, mask = self._joinable(adapters)
        plain = all(p.module.bias is None for p in self.projections)
        if fast and plain and weights and gates(x, weights, stacked, mask):
            return decoding_gate(x, weights, stacked, mask, activation)
        apart = all(p.packed is None for p in self.projections) and len(self.projections) == 2
        if apart and fast and adapters.used and self.a is not None and fits(x, self.a, self.b):
            products = [partial(projection.multiply, x, fast) for projection in self.projections]
            low, *outputs = side_by_side([partial(project_rows, x, self.a), *products], x.device)
            return gate_rows(low, self.b, outputs, adapters.mask, activation)
        outputs = self(x, adapters, fast)
        gate, up = outputs[0].chunk(2, -1) if len(outputs) == 1 else outputs
        if activation == "silu":
            return swiglu(gate, up, fast=fast)
        return geglu(gate, up, tanh=activation == "gelu_tanh", fast=fast)

    def _joinable(
        self, adapters: Selection
    ) -> tuple[list[NF4Weight | torch.Tensor], StackedAdapters | None, torch.Tensor | None]:
        """Weights (none where not all are within reach), adapters and mask for :func:`decoding_linears`."""
        weights = [weight for p in self.projections if (weight := p.stored) is not None]
        used = adapters.used and self.stacked is not None
        whole = len(weights) == len(self.projections)
        return weights if whole else [], self.stacked if used else None, adapters.mask if used else None


class AdapterBank:
    """Adapters by name: the live ones of the model's PEFT layers, and those that were loaded for generation only.

    Attributes:
        slots: Names of those in use, by their place in the matrices; None where a place is free again.
        loaded: Matrices by path of the layer, of the loaded ones.
        watched: The tensors that the matrices were copied from.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.slots: list[str | None] = []
        self.loaded: dict[str, Mapping[str, Pair]] = {}
        self._sites: list[Site] = []
        self._versions: tuple | None = None
        self.watched: list[torch.Tensor] = []

    def site(self, name: str, projections: list[Projection]) -> Site:
        """Register projections of one input."""
        site = Site(name, projections)
        self._sites.append(site)
        return site

    def clear_sites(self) -> None:
        """Forget all projections: the model is read anew."""
        self._sites.clear()
        self._versions = None

    def live(self) -> list[str]:
        """Names of the adapters of the model itself."""
        names: dict[str, None] = {}
        for projection in self._projections():
            if projection.lora is not None:
                names |= dict.fromkeys(projection.lora.lora_A)
        return list(names)

    def names(self) -> list[str]:
        """All names; a live adapter hides a loaded one of its name."""
        return list(dict.fromkeys([*self.live(), *self.loaded]))

    def active(self) -> str | None:
        """The adapter that the model as it stands applies; None if none.

        Raises:
            AdapterError: Several at once.
        """
        layers = [p.lora for p in self._projections() if p.lora is not None]
        names = {
            name
            for lora in layers
            if not lora.disable_adapters and not lora.merged
            for name in lora.active_adapters
            if name in lora.lora_A
        }
        if len(names) > 1:
            raise AdapterError("several adapters are active at once", got=sorted(names), do="Use set_adapter with one.")
        return next(iter(names), None)

    def require(self, name: str) -> int:
        """The slot of an adapter, made on its first use.

        Raises:
            AdapterError: There is none of that name, or it is merged into the weights, or it cannot be applied.
        """
        if name not in self.names():
            known = ", ".join(self.names()) or "none"
            raise AdapterError("no adapter of that name", got=name, do=f"There are: {known}. Load it first.")
        merged = any(p.lora is not None and p.lora.merged for p in self._projections())
        if merged:
            raise AdapterError("an adapter is merged into the weights", got=name, do="Call unmerge_adapter() first.")
        if name not in self.slots:
            for projection in self._projections():
                self._pair(projection, name)  # raises where it cannot be applied
            if None in self.slots:
                self.slots[self.slots.index(None)] = name
            else:
                self.slots.append(name)
            self._versions = None
        return self.slots.index(name)

    def forget(self, name: str) -> None:
        """Take a loaded adapter out."""
        self.loaded.pop(name, None)
        if name in self.slots:
            self.slots[self.slots.index(name)] = None
            self._versions = None

    def select(self, slots: Sequence[int | None]) -> tuple[bool, bool]:
        """(whether any row has an adapter, whether a mask is needed) for rows with these slots."""
        used = any(slot is not None for slot in slots)
        return used, used and (len(self.slots) > 1 or any(slot is None for slot in slots))

    def changed(self) -> bool:
        """Whether the matrices are not those of the adapters any more, as far as torch can tell."""
        return self._versions != _versions(self.watched)

    def refresh(self) -> bool:
        """Copy all adapters; returns whether matrices were allocated anew."""
        pairs = (self._pair(projection, name) for projection in self._projections() for name in self.slots)
        self.watched = [tensor for pair in pairs if pair is not None for tensor in pair[:2]]
        self._versions = _versions(self.watched)
        moved = False
        sources: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        for site in self._sites:
            moved = self._place(site, sources, targets) or moved
        if sources:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
                self._scale()
        return moved

    def _projections(self) -> list[Projection]:
        return [projection for site in self._sites for projection in site.projections]

    def _pair(self, projection: Projection, name: str | None) -> Pair | None:
        lora = projection.lora
        if name is None:
            return None
        if lora is not None and name in lora.lora_A:
            if name in lora.lora_variant or lora.lora_bias.get(name) or lora.fan_in_fan_out:
                raise AdapterError("the engine cannot apply this kind of adapter", got=f"{name} at {projection.path}")
            return lora.lora_A[name].weight, lora.lora_B[name].weight, float(lora.scaling[name])
        found = self.loaded.get(name)
        return None if found is None else found.get(projection.path)

    def _place(self, site: Site, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> bool:
        """List what is to be copied for a site; returns whether its matrices are new."""
        pairs = [[self._pair(projection, name) for name in self.slots] for projection in site.projections]
        ranks = [pair[0].shape[0] for row in pairs for pair in row if pair is not None]
        if not ranks:
            had, site.a, site.b, site.stacked = site.a is not None, None, [], None
            return had
        rank = -(-max(ranks) // _STEP) * _STEP
        width = rank * len(self.slots)
        shape = (width * len(site.projections), site.projections[0].in_features)
        new = site.a is None or site.a.shape != shape
        if new:
            options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
            site.a = torch.zeros(shape, **options)
            site.b = [torch.zeros(p.out_features, width, **options) for p in site.projections]
            site.stacked = StackedAdapters(site.a, tuple(site.b), (1.0,) * len(site.b))  # B has its scale in it
        assert site.a is not None
        for i, row in enumerate(pairs):
            for j, pair in enumerate(row):
                start = i * width + j * rank
                used = 0 if pair is None else pair[0].shape[0]
                if not new and used < rank:  # another adapter may have stood here
                    site.a[start + used : start + rank].zero_()
                    site.b[i][:, j * rank + used : (j + 1) * rank].zero_()
                if pair is not None:
                    sources += [pair[0].detach(), pair[1].detach()]
                    targets += [site.a[start : start + used], site.b[i][:, j * rank : j * rank + used]]
        return new

    def _scale(self) -> None:
        """Multiply the copies of B by their adapters' scales."""
        by_scale: dict[float, list[torch.Tensor]] = {}
        for site in self._sites:
            if site.a is None:
                continue
            rank = site.b[0].shape[1] // len(self.slots)
            for projection, b in zip(site.projections, site.b, strict=True):
                for j, name in enumerate(self.slots):
                    pair = self._pair(projection, name)
                    if pair is not None and pair[2] != 1:
                        by_scale.setdefault(pair[2], []).append(b[:, j * rank : j * rank + pair[0].shape[0]])
        for scale, targets in by_scale.items():
            torch._foreach_mul_(targets, scale)


def _versions(tensors: Sequence[torch.Tensor]) -> tuple:
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
