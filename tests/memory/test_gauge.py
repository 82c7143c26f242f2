"""What layers may take follows from the peaks that passes left."""

from __future__ import annotations

import torch

from unsloth.memory.budget import LayerSizes, Place
from unsloth.memory.gauge import Gauge, Reading
from unsloth.memory.keeper import Keeper

GIB = 2**30
DEVICE = torch.device("cuda")


def test_room_is_what_the_others_left():
    readings = [Reading(80 * GIB, 10 * GIB, 10 * GIB)]
    gauge = Gauge(lambda device: readings[-1])
    first = gauge.room(DEVICE, 100, later=2 * GIB, held=0)
    assert not first.known and first.size == (80 - 10 - 2) * GIB - int(0.04 * 80 * GIB)
    readings.append(Reading(80 * GIB, 12 * GIB, 50 * GIB))  # layers held 5, logits and others 45
    gauge.learn(DEVICE, 100, held=5 * GIB)
    second = gauge.room(DEVICE, 100, later=2 * GIB, held=0)
    assert second.known and second.size == (80 - 45 - 2) * GIB - int(0.04 * 80 * GIB)
    assert gauge.room(DEVICE, 50, later=0, held=0).known
    assert not gauge.room(DEVICE, 101, later=0, held=0).known


def test_a_gpu_that_is_full_leaves_nothing():
    gauge = Gauge(lambda device: Reading(GIB, GIB, GIB))
    assert gauge.room(DEVICE, 1, later=0, held=0).size == 0


def keeper_with(readings):
    keeper = Keeper(4)
    keeper._gauge = Gauge(lambda device: readings[-1])
    return keeper


SIZES = LayerSizes(least=GIB, fixed=0, rest=4 * GIB, working=2 * GIB)


def places(keeper, sizes=SIZES):
    return [keeper.decide(i, "unsloth", sizes, 0, DEVICE).place for i in range(4)]


def test_the_first_pass_keeps_little_the_next_what_fits_beside_the_logits():
    readings = [Reading(80 * GIB, 10 * GIB, 10 * GIB)]
    keeper = keeper_with(readings)
    assert places(keeper) == [Place.RECOMPUTE] * 4
    readings.append(Reading(80 * GIB, 10 * GIB, 30 * GIB))
    assert places(keeper) == [Place.KEEP] * 4
    keeper = keeper_with(readings := [Reading(80 * GIB, 10 * GIB, 10 * GIB)])
    places(keeper)
    readings.append(Reading(80 * GIB, 10 * GIB, 70 * GIB))  # 6 of them the layers'
    assert places(keeper) == [Place.RECOMPUTE] * 3 + [Place.KEEP]


def test_a_longer_batch_than_any_before_keeps_little_again():
    readings = [Reading(80 * GIB, 10 * GIB, 20 * GIB)]
    keeper = keeper_with(readings)
    places(keeper)
    assert places(keeper) == [Place.KEEP] * 4
    longer = LayerSizes(least=2 * GIB, fixed=0, rest=8 * GIB, working=4 * GIB)
    assert places(keeper, longer) == [Place.RECOMPUTE] * 4


def test_weights_are_held_as_the_longest_batches_allow():
    short = LayerSizes(least=GIB, fixed=0, rest=4 * GIB, working=2 * GIB, weights=8 * GIB)
    long = LayerSizes(least=2 * GIB, fixed=0, rest=8 * GIB, working=4 * GIB, weights=8 * GIB)
    keeper = keeper_with([Reading(92 * GIB, 10 * GIB, 20 * GIB)])

    def holding(sizes, batch):
        for i in range(4):
            keeper.decide(i, "unsloth", sizes, 0, DEVICE, batch)
            keeper.held(i)
        return keeper.assignment.holding

    assert holding(short, (1,)) == 0  # nothing is known yet
    assert holding(short, (1,)) == 4
    assert holding(long, (2,)) == 0  # longer than any before
    assert holding(long, (2,)) == 3
    assert holding(short, (1,)) == 3 and holding(long, (2,)) == 3  # and not dequantized anew from batch to batch
    keeper.forget()
    assert holding(short, (1,)) == 4
