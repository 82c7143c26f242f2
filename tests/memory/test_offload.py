"""An arena hands out disjoint slices within its limit; parcels come back as they were sent."""

from __future__ import annotations

import gc
import random

import torch

from unsloth.memory.arena import Arena
from unsloth.memory.offload import Offloader
from unsloth.memory.pinned import host_memory


def test_slices_never_overlap_and_merge_when_they_come_back():
    arena, out, chance = Arena(64 * 4096, pin=False), [], random.Random(1)
    assert arena.reserve(64 * 4096)
    for _ in range(2000):
        if out and chance.random() < 0.5:
            arena.give_back(out.pop(chance.randrange(len(out))))
            continue
        piece = arena.take(chance.randrange(1, 5 * 4096))
        if piece is not None:
            assert all(p.start + p.size <= piece.start or piece.start + piece.size <= p.start for p in out)
            out.append(piece)
        assert arena.used == sum(p.size for p in out) <= arena.limit
    for piece in out:
        arena.give_back(piece)
    assert arena.used == 0 and arena.take(64 * 4096) is not None


def test_the_limit_holds():
    arena = Arena(3 * 4096, pin=False)
    assert arena.take(2 * 4096) is not None
    assert arena.take(2 * 4096) is None
    assert arena.take(4096) is not None
    assert arena.reserved == 3 * 4096


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator).bfloat16()]


def test_parcels_come_back_in_any_order():
    offloader = Offloader(Arena(2**20, pin=False), torch.device("cpu"))
    parcels = [offloader.send(tensors(i)) for i in range(5)]
    for i in (4, 3, 1, 2, 0):
        back = parcels[i].fetch()
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back, tensors(i), strict=True))


def test_a_full_arena_sends_nothing_and_keeps_no_slice():
    offloader = Offloader(Arena(2 * 4096, pin=False), torch.device("cpu"))
    first = offloader.send(tensors(0))
    assert offloader.send(tensors(1)) is None
    used = offloader.arena.used
    del first
    gc.collect()
    assert used == 2 * 4096 and offloader.arena.used == 0
    assert offloader.send(tensors(1)) is not None


def test_at_most_two_parcels_hold_their_tensors_while_they_leave():
    import weakref

    offloader = Offloader(Arena(2**20, pin=False), torch.device("cpu"))
    sent = []
    for i in range(5):
        given = tensors(i)
        sent.append((offloader.send(given), [weakref.ref(t) for t in given]))
        del given
    assert [all(ref() is None for ref in refs) for _, refs in sent] == [True, True, True, False, False]
    sent[4][0].fetch()
    assert all(ref() is None for _, refs in sent for ref in refs)


def test_host_memory_is_zero_writable_and_freed():
    memory = host_memory(3 * 2**20 + 4096)
    assert memory.dtype == torch.uint8 and memory.numel() == 3 * 2**20 + 4096 and not memory.any()
    piece = memory[4096 : 4096 + 4000].view(torch.float32)
    piece.copy_(torch.arange(1000.0))
    del memory
    assert piece.sum() == 499500
