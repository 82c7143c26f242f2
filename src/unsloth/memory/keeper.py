"""Decides, for one model, what becomes of each layer's values between forward and backward, and moves those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsloth.core.device import free_memory
from unsloth.core.log import get_logger
from unsloth.memory.arena import Arena
from unsloth.memory.budget import Assignment, Budget, LayerSizes, Place, assign
from unsloth.memory.checkpointing import Policy
from unsloth.memory.choosing import Chooser
from unsloth.memory.gauge import Gauge, Room
from unsloth.memory.offload import Offloader, Parcel

_IDLE_PASSES = 16

logger = get_logger(__name__)


@dataclass(frozen=True)
class Decision:
    """For one layer of one forward pass.

    Attributes:
        place: Of its values.
        lean: Whether memory is so short that time is spent to hold less of it at once.
        holds_weights: Whether dequantized weights stay for the next pass.
    """

    place: Place
    lean: bool
    holds_weights: bool = False


class Keeper:
    """State that the layers of one model share: the places of the pass that is running, and what is on the host.

    A copy starts anew, with nothing of the original's memory.

    Args:
        layers: How many there are.
        captures: Whether layers may be recorded as CUDA graphs.

    Attributes:
        shapes: Of batches, with the graphs recorded for them; who records decides what is in it, but for a method
            ``release`` that drops what stays from pass to pass.
        separate: Decides for layers that are computed by separate functions.
    """

    def __init__(self, layers: int, captures: bool = False) -> None:
        self.layers, self.captures = layers, captures
        self.shapes: dict[tuple, Any] = {}
        self.separate = Chooser(layers)
        self.assignment = Assignment((), lean=False)
        self._offloader: Offloader | None = None
        self._gauge = Gauge()
        self._held: dict[int, dict[str, tuple[Any, Any]]] = {}
        self._asked: tuple[Policy, LayerSizes, torch.device] | None = None
        self._batch: tuple[Any, ...] = ()
        self._known = False
        self._standing: tuple[Any, ...] | None = None
        self._standing_bytes: dict[int, int] = {}
        self._passes = self._stood = 0

    def __reduce__(self) -> tuple:
        return Keeper, (self.layers, self.captures)

    def decide(
        self,
        layer: int,
        policy: Policy | None,
        sizes: LayerSizes,
        later: int,
        device: torch.device,
        batch: tuple[Any, ...] = (),
    ) -> Decision:
        """The decision for layer number ``layer``; that of all is made when the first one asks.

        Args:
            layer: From 0.
            policy: None keeps everything.
            sizes: Of every layer, for this batch.
            later: Bytes of the device that the rest of the step will need: gradients, optimizer state.
            device: Where it computes.
            batch: Its shape, and what else recorded layers depend on.
        """
        if policy is None or policy is False:
            self._held = {}
            return Decision(Place.KEEP, lean=False)
        if policy is True or device.type != "cuda" and policy == "unsloth":
            return Decision(Place.RECOMPUTE, lean=False)
        if layer == 0:
            budget = policy if isinstance(policy, Budget) else Budget()
            host, room = self._host_bytes(budget), self._room(budget, sizes, later, device, batch)
            new = assign(self.layers, sizes, room.size, host, keep=room.known)
            settled = self._known and self._asked == (policy, sizes, device)
            if not (settled and _as_good(self.assignment, new, sizes, room.size)):
                self.assignment = new
            self._asked, self._batch, self._known = (policy, sizes, device), batch, room.known
            self._held = {i: held for i, held in self._held.items() if i < self.assignment.holding}
            self._prepare(host, sizes, device)
        if self._asked != (policy, sizes, device):  # another device, or called on its own
            return Decision(Place.RECOMPUTE, lean=True)
        chosen = self.assignment
        if self._offloader is not None and chosen.places[layer] is not Place.OFFLOAD:
            self._offloader.progress()
        return Decision(chosen.places[layer], chosen.lean, layer < chosen.holding)

    def held(self, layer: int) -> dict[str, tuple[Any, Any]]:
        """Where the dequantized weights of a layer stay, by name, with what they are of."""
        return self._held.setdefault(layer, {})

    def send(self, tensors: list[torch.Tensor]) -> Parcel | None:
        """Move contiguous ``tensors`` to the host; None if there is no room."""
        return None if self._offloader is None else self._offloader.send(tensors)

    def began(self, batch: tuple[Any, ...]) -> None:
        """A pass of a batch of this form, which may be recorded, has begun."""
        self._passes += 1
        if batch == self._standing:
            self._stood = self._passes

    def may_stand(self, batch: tuple[Any, ...]) -> bool:
        """Whether what recorded layers keep for batches of this form may stay from pass to pass.

        It may for one form; for another when that has not come for a while.
        """
        if self._standing not in (None, batch):
            if self._passes - self._stood <= _IDLE_PASSES:
                return False
            self.release()
        self._standing, self._stood = batch, self._passes
        return True

    def stands(self, layer: int, size: int) -> None:
        """That ``size`` bytes of ``layer`` do so."""
        self._standing_bytes[layer] = size

    def make_way(self, device: torch.device) -> None:
        """Release what stays from pass to pass, if no more memory than it takes is free for what comes now."""
        standing = sum(self._standing_bytes.values())
        if standing and device.type == "cuda" and self._gauge.free(device) < standing:
            self.release()

    def release(self) -> None:
        """Drop what recorded layers keep from pass to pass."""
        for known in self.shapes.values():
            known.release()
        self._standing, self._standing_bytes = None, {}

    def _room(
        self, budget: Budget, sizes: LayerSizes, later: int, device: torch.device, batch: tuple[Any, ...]
    ) -> Room:
        """On the device: by the budget, or by what passes so far have left."""
        standing = sum(self._standing_bytes.values())
        of_others = 0 if self._standing in (None, batch) else standing
        if budget.device is not None:
            return Room(max(0, budget.device - of_others), known=True)
        if device.type != "cuda":
            return Room(0, known=True)
        if self._asked is not None and self._asked[2] == device:
            before = self._asked[1]
            beside = 0 if self._standing in (None, self._batch) else standing
            self._gauge.learn(device, before.least, self.assignment.device_bytes(before) + beside)
        room = self._gauge.room(device, sizes.least, later, len(self._held) * sizes.weights + standing)
        return Room(max(0, room.size - of_others), room.known)

    def _host_bytes(self, budget: Budget) -> int:
        """The limit of the arena, there or to come."""
        if budget.host is not None:
            return budget.host
        if self._offloader is not None:
            return self._offloader.arena.limit
        return (free_memory(torch.device("cpu")) or 0) // 2

    def _prepare(self, limit: int, sizes: LayerSizes, device: torch.device) -> None:
        """Reserve host memory for what will go there."""
        count = self.assignment.places.count(Place.OFFLOAD)
        if not count:
            return
        if self._offloader is None or self._offloader.arena.limit != limit:
            self._offloader = Offloader(Arena(limit, pin=device.type == "cuda"), device)
        arena = self._offloader.arena
        missing = count * sizes.least - (arena.reserved - arena.used)
        if missing > 0 and arena.reserve(missing):
            logger.info(
                "activations: %d of %d layers wait in host memory, %.1f GiB pinned",
                count,
                self.layers,
                arena.reserved / 2**30,
            )


def _as_good(old: Assignment, new: Assignment, sizes: LayerSizes, room: int) -> bool:
    """Whether ``old`` fits as well and keeps all but one layer of what ``new`` does, so that nothing need change."""
    kept = (new.places.count(Place.KEEP) - old.places.count(Place.KEEP), new.holding - old.holding)
    same = old.lean == new.lean and old.places.count(Place.OFFLOAD) == new.places.count(Place.OFFLOAD)
    return same and len(old.places) == len(new.places) and max(kept) <= 1 and old.device_bytes(sizes) <= room
