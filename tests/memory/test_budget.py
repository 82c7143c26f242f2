"""Who keeps, who recomputes and who moves to the host, from sizes and bytes alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from unsloth.core.errors import ConfigError
from unsloth.memory.budget import Budget, LayerSizes, Place, assign

SIZES = LayerSizes(least=10, fixed=1, rest=50, working=100, quick=20, keeping=7)


def counts(device, host=0, layers=8):
    found = assign(layers, SIZES, device, host)
    assert len(found.places) == layers
    return found, Counter(found.places)


def on_device(found):
    """The most bytes on the device at the start of the backward, by the definition of the sizes."""
    number = Counter(found.places)
    least = max(2, number[Place.KEEP] + number[Place.RECOMPUTE])  # two move at a time
    extra = 7 if number[Place.KEEP] else 0 if found.lean else 20
    return 100 + extra + len(found.places) * 1 + least * 10 + number[Place.KEEP] * 50


def test_plenty_of_memory_keeps_everything():
    assert counts(107 + 8 + 80 + 400)[1] == {Place.KEEP: 8}


def test_one_byte_less_recomputes_one_layer_which_is_the_first():
    found, number = counts(107 + 8 + 80 + 400 - 1)
    assert number == {Place.RECOMPUTE: 1, Place.KEEP: 7} and found.places[0] is Place.RECOMPUTE


def test_just_enough_for_recomputing_offloads_nothing():
    assert counts(100 + 8 + 80, host=1000)[1] == {Place.RECOMPUTE: 8}
    assert counts(100 + 8 + 79, host=1000)[1][Place.OFFLOAD] > 0


def test_no_room_offloads_all_but_two_or_what_the_host_takes():
    assert counts(0, host=1000)[1] == {Place.OFFLOAD: 6, Place.RECOMPUTE: 2}
    found, number = counts(0, host=25)
    assert number == {Place.OFFLOAD: 2, Place.RECOMPUTE: 6} and found.places[:2] == (Place.OFFLOAD,) * 2
    assert counts(0, host=0)[1] == {Place.RECOMPUTE: 8}


def test_time_is_spent_for_memory_only_where_it_is_short():
    assert counts(100 + 8 + 80 + 19)[0].lean
    assert not counts(100 + 8 + 80 + 20)[0].lean


@pytest.mark.parametrize("device", range(128, 700, 7))
def test_whatever_is_chosen_fits_and_could_not_keep_one_more(device):
    found, number = counts(device, host=1000)
    assert found.device_bytes(SIZES) == on_device(found) <= device
    assert list(found.places) == sorted(found.places, key=[Place.OFFLOAD, Place.RECOMPUTE, Place.KEEP].index)
    if number[Place.KEEP] < 8 and not number[Place.OFFLOAD]:
        assert 107 + 88 + 50 * (number[Place.KEEP] + 1) > device


@pytest.mark.parametrize("value", [-1, 1.5, "1GB", True])
def test_budgets_are_bytes(value):
    with pytest.raises(ConfigError, match="number of bytes"):
        Budget(device=value)


def test_what_is_left_after_values_holds_weights():
    sizes = dataclasses.replace(SIZES, weights=30)
    everything = 107 + 8 + 80 + 400
    assert assign(8, sizes, everything + 29, 0).holding == 0
    assert assign(8, sizes, everything + 95, 0).holding == 3
    assert assign(8, sizes, everything + 95, 0).device_bytes(sizes) == everything + 90
    assert assign(8, sizes, everything + 1000, 0).holding == 8
    assert assign(8, sizes, everything - 1, 0).holding == 0


def test_buffers_of_recorded_layers_are_there_unless_all_are_kept():
    sizes = dataclasses.replace(SIZES, buffers=5)
    recomputed, kept = assign(8, sizes, 100 + 8 + 80 + 5, 0), assign(8, sizes, 107 + 8 + 80 + 400 + 5, 0)
    assert set(recomputed.places) == {Place.RECOMPUTE} and recomputed.waiting_bytes(sizes) == 8 + 80 + 5
    assert set(kept.places) == {Place.KEEP} and kept.waiting_bytes(sizes) == 8 + 80 + 400
    assert assign(8, sizes, 100 + 8 + 80 + 4, 1000).places.count(Place.OFFLOAD) == 3


def test_where_layers_move_to_the_host_anyway_the_backward_is_quick_if_two_may_stay():
    assert counts(100 + 8 + 20 + 20, host=1000)[0].lean is False
    assert counts(100 + 8 + 20 + 19, host=1000)[0].lean is True
    found, number = counts(100 + 8 + 20 + 30, host=50)  # the host takes no more than 5
    assert not found.lean and number == {Place.OFFLOAD: 5, Place.RECOMPUTE: 3} and found.tight
    assert counts(100 + 8 + 20 + 29, host=50)[0].lean
