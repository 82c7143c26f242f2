"""Decides, for one model, what becomes of each layer's values between forward and backward, and moves those that go."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
_SETTLED = 16

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
        captures_own: Whether those may whose own weights are trained.
        mixes: Whether layers of float32 weights that are trained may have products in bfloat16.

    Attributes:
        shapes: Of batches, with the graphs recorded for them; who records decides what is in it, but for a method
            ``release`` that drops what stays from pass to pass.
        separate: Decides for layers that are computed by separate functions.
    """

    def __init__(self, layers: int, captures: bool = False, captures_own: bool = False, mixes: bool = False) -> None:
        self.layers, self.captures, self.captures_own, self.mixes = layers, captures, captures_own, mixes
        self.shapes: dict[tuple, Any] = {}
        self.separate = Chooser(layers)
        self.assignment = Assignment((), lean=False)
        self._offloader: Offloader | None = None
        self._gauge = Gauge()
        self._held: dict[int, dict[str, tuple[Any, Any]]] = {}
        self._asked: tuple[Policy, LayerSizes, torch.device] | None = None
        self._batch: tuple[Any, ...] = ()
        self._settled: dict[tuple[Any, ...], tuple[Any, Assignment]] = {}
        self._standing: dict[tuple[Any, ...], dict[int, int]] = {}
        self._stood: dict[tuple[Any, ...], int] = {}
        self._passes = 0
        self._may_hold = layers

    def __reduce__(self) -> tuple:
        return Keeper, (self.layers, self.captures, self.captures_own, self.mixes)

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
            host, asked = self._host_bytes(budget), (policy, sizes, device)
            room = self._room(budget, sizes, later, device, batch)
            new = assign(self.layers, sizes, room.size, host, keep=room.known)
            if new.places.count(Place.KEEP) < self.layers and self._release_idle(batch):
                room = self._room(budget, sizes, later, device, batch)
                new = assign(self.layers, sizes, room.size, host, keep=room.known)
            self.assignment = self._steady(batch, asked, new, room)
            if self._asked is None or self._asked[0] != policy:
                self._may_hold = self.layers
            if room.known:  # as few as the longest batch leaves room for: weights are of all batches
                self._may_hold = min(self._may_hold, self.assignment.holding)
                self.assignment = replace(self.assignment, holding=self._may_hold)
            self._asked, self._batch = asked, batch
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
        if batch in self._standing:
            self._stood[batch] = self._passes

    def may_stand(self, batch: tuple[Any, ...]) -> bool:
        """Whether what recorded layers keep for batches of this form may stay from pass to pass.

        It may where room is counted, in which all that stands is; else for one form, until that has not come for a
        while.
        """
        if batch not in self._standing and batch != self._batch and self._standing:
            self._release_idle(batch)
            if self._standing:
                return False
        self._standing.setdefault(batch, {})
        self._stood[batch] = self._passes
        return True

    def stands(self, batch: tuple[Any, ...], layer: int, size: int) -> None:
        """That ``size`` bytes of ``layer`` do so."""
        self._standing.setdefault(batch, {})[layer] = size

    def make_way(self, device: torch.device) -> None:
        """Release what stays from pass to pass, if no more memory than it takes is free for what comes now."""
        standing = self._bytes()
        if standing and device.type == "cuda" and self._gauge.free(device) < standing:
            self.release()

    def release(self, batch: tuple[Any, ...] | None = None) -> None:
        """Drop what recorded layers keep from pass to pass, for batches of one shape or of all."""
        for key, known in self.shapes.items():
            if batch is None or key[0] == batch:
                known.release()
        for gone in [batch] if batch is not None else list(self._standing):
            self._standing.pop(gone, None)
            self._stood.pop(gone, None)

    def forget(self) -> None:
        """Drop everything that stays from pass to pass: graphs with their memory, and dequantized weights."""
        self.release()
        self.shapes.clear()
        self._held, self._settled, self._may_hold = {}, {}, self.layers

    def _release_idle(self, batch: tuple[Any, ...]) -> bool:
        """Release what stands for shapes other than ``batch`` that have not come for a while; whether there are any."""
        idle = [b for b, last in self._stood.items() if b != batch and self._passes - last > _IDLE_PASSES]
        for other in idle:
            self.release(other)
        return bool(idle)

    def _bytes(self, batch: tuple[Any, ...] | None = None) -> int:
        """What stands, for batches of one shape or of all."""
        found = self._standing.values() if batch is None else [self._standing.get(batch, {})]
        return sum(sum(layers.values()) for layers in found)

    def _steady(self, batch: tuple[Any, ...], asked: Any, new: Assignment, room: Room) -> Assignment:
        """What such batches were assigned before, if it is about as good: changes are recorded anew."""
        before, old = self._settled.get(batch, (None, new))
        chosen = old if before == asked and _as_good(old, new, asked[1], room.size) else new
        self._settled.pop(batch, None)
        if room.known:
            self._settled[batch] = asked, chosen
        if len(self._settled) > _SETTLED:
            self._settled.pop(next(iter(self._settled)))
        return chosen

    def _room(
        self, budget: Budget, sizes: LayerSizes, later: int, device: torch.device, batch: tuple[Any, ...]
    ) -> Room:
        """On the device: by the budget, or by what passes so far have left."""
        standing = self._bytes()
        of_others = standing - self._bytes(batch)
        if budget.device is not None:
            return Room(max(0, budget.device - of_others), known=True)
        if device.type != "cuda":
            return Room(0, known=True)
        if self._asked is not None and self._asked[2] == device:
            before = self._asked[1]
            beside = standing - self._bytes(self._batch)
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
