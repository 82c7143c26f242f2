"""How much of a forward pass may stay for the backward pass, and which layer's share stays where.

Between forward and backward every layer has a part that must exist somewhere (its input and attention's output: the
least), and a rest that can be computed again from it. Where memory is short the least part moves to host memory; where
it is plentiful the rest stays too. Layers are released in the reverse of their order, so the last ones are the ones to
keep whole, and the first ones have the most time to move out and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from unsloth.core.errors import ConfigError

STAGING = 2
"""Layers whose values are on the device while they move out or back; so the last ones need not move."""


class Place(Enum):
    """What becomes of a layer's values between forward and backward.

    Attributes:
        KEEP: All that the backward reads stays on the device.
        RECOMPUTE: The least stays on the device, the rest is computed again.
        OFFLOAD: The least goes to host memory, the rest is computed again.
    """

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class Budget:
    """Bytes that layers may keep between forward and backward.

    Attributes:
        device: On the device, with what one layer needs while it is computed again; None: what passes so far have left
            free (:mod:`unsloth.memory.gauge`).
        host: Pinned host memory; None: up to half of what is free there; 0: none.
    """

    device: int | None = None
    host: int | None = None

    def __post_init__(self) -> None:
        for name in ("device", "host"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(
                    f"a memory budget's {name} must be a number of bytes", got=value, do="Pass an int, or None."
                )


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of one layer for a batch.

    Attributes:
        least: What must exist between forward and backward, and can move to the host.
        fixed: What must exist and stays on the device.
        rest: What a layer keeps beside them that computes nothing again.
        working: What the backward of one layer holds at once beside its own least part, at the least.
        quick: How much more it holds where it spends memory to save time.
        keeping: How much more it holds if it was kept.
        weights: Its weights, dequantized.
        buffers: Of recorded layers, one set for all of them.
    """

    least: int
    fixed: int
    rest: int
    working: int
    quick: int = 0
    keeping: int = 0
    weights: int = 0
    buffers: int = 0


@dataclass(frozen=True)
class Assignment:
    """What becomes of the layers of one pass.

    Attributes:
        places: Of every layer, first to last: some (or none) offloaded, then some recomputed, then some kept.
        lean: Whether memory is so short that time is spent to hold less of it at once.
        holding: How many layers, from the first, hold their dequantized weights between passes.
    """

    places: tuple[Place, ...]
    lean: bool
    holding: int = 0

    @property
    def tight(self) -> bool:
        """Whether memory is short for what else a step holds."""
        return self.lean or Place.OFFLOAD in self.places

    def device_bytes(self, sizes: LayerSizes, staging: int = STAGING) -> int:
        """Bytes on the device when the backward of the last layer runs, the most there is for layers."""
        more = sizes.keeping if Place.KEEP in self.places else 0 if self.lean else sizes.quick
        return self.waiting_bytes(sizes, staging) + sizes.working + more

    def waiting_bytes(self, sizes: LayerSizes, staging: int = STAGING) -> int:
        """Bytes on the device between the forward of the last layer and its backward."""
        count = {place: self.places.count(place) for place in Place}
        stay = count[Place.KEEP] + count[Place.RECOMPUTE]
        least = max(stay, min(staging, len(self.places)))
        values = len(self.places) * sizes.fixed + least * sizes.least + count[Place.KEEP] * sizes.rest
        recorded = sizes.buffers if count[Place.KEEP] < len(self.places) else 0
        return values + self.holding * sizes.weights + recorded


def assign(
    layers: int, sizes: LayerSizes, device: int, host: int, *, keep: bool = True, staging: int = STAGING
) -> Assignment:
    """Decide for every layer.

    Args:
        layers: How many, all alike.
        sizes: Of one.
        device: Bytes for them on the device.
        host: Bytes for them on the host.
        keep: Whether layers may keep more than their least.
        staging: Layers whose least part is on the device while it moves.

    Returns:
        What keeps most and fits. Where offloading every layer does not fit, as many are offloaded as the host takes.
        Offloaded layers cost little time, so what room there is then serves their backward before more of them stay.
    """
    room = device - sizes.working - layers * sizes.fixed - sizes.buffers
    spare = room - layers * sizes.least
    if spare >= 0:
        most = layers if not sizes.rest else max(0, spare - sizes.keeping) // sizes.rest
        kept = min(layers, most) if keep else 0
        left = spare - sizes.keeping - kept * sizes.rest
        holding = min(layers, left // sizes.weights) if kept == layers and sizes.weights else 0
        places = (Place.RECOMPUTE,) * (layers - kept) + (Place.KEEP,) * kept
        return Assignment(places, lean=spare < sizes.quick, holding=holding)
    offloaded = min(layers, host // sizes.least)
    lean = room - sizes.quick < max(staging, layers - offloaded) * sizes.least
    stay = min(layers, max(staging, (room if lean else room - sizes.quick) // sizes.least))
    offloaded = min(offloaded, layers - stay)
    return Assignment((Place.OFFLOAD,) * offloaded + (Place.RECOMPUTE,) * (layers - offloaded), lean=lean)


def fixed_assignment(layers: int, place: Place) -> Assignment:
    """The same place for every layer, without counting bytes."""
    return Assignment((place,) * layers, lean=place is Place.OFFLOAD)
