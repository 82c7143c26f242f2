"""Who keeps, who recomputes and who moves to the host, from sizes and bytes alone."""

from __future__ import annotations

from collections import Counter

import pytest

from unsloth.core.errors import ConfigError
from unsloth.memory.budget import Budget, LayerSizes, Place, assign

SIZES = LayerSizes(least=10, fixed=1, rest=50, working=100)


def counts(device, host=0, layers=8):
    places = assign(layers, SIZES, device, host)
    assert len(places) == layers
    return places, Counter(places)


def on_device(places, staging=3):
    """The most bytes on the device at the start of the backward, by the definition of the sizes."""
    number = Counter(places)
    least = number[Place.KEEP] + number[Place.RECOMPUTE] + min(staging, number[Place.OFFLOAD])
    return 100 + len(places) * 1 + least * 10 + number[Place.KEEP] * 50


def test_plenty_of_memory_keeps_everything():
    assert counts(100 + 8 + 80 + 400)[1] == {Place.KEEP: 8}


def test_one_byte_less_recomputes_one_layer_which_is_the_first():
    places, number = counts(100 + 8 + 80 + 400 - 1)
    assert number == {Place.RECOMPUTE: 1, Place.KEEP: 7} and places[0] is Place.RECOMPUTE


def test_just_enough_for_recomputing_offloads_nothing():
    assert counts(100 + 8 + 80, host=1000)[1] == {Place.RECOMPUTE: 8}
    assert counts(100 + 8 + 79, host=1000)[1][Place.OFFLOAD] > 0


def test_no_room_offloads_all_or_what_the_host_takes():
    assert counts(0, host=1000)[1] == {Place.OFFLOAD: 8}
    places, number = counts(0, host=25)
    assert number == {Place.OFFLOAD: 2, Place.RECOMPUTE: 6} and places[:2] == (Place.OFFLOAD,) * 2
    assert counts(0, host=0)[1] == {Place.RECOMPUTE: 8}


@pytest.mark.parametrize("device", range(138, 700, 7))
def test_whatever_is_chosen_fits_and_could_not_keep_one_more(device):
    places, number = counts(device, host=1000)
    assert on_device(places) <= device
    assert list(places) == sorted(places, key=[Place.OFFLOAD, Place.RECOMPUTE, Place.KEEP].index)
    if number[Place.KEEP] < 8 and not number[Place.OFFLOAD]:
        assert on_device(places) + 50 > device


@pytest.mark.parametrize("value", [-1, 1.5, "1GB", True])
def test_budgets_are_bytes(value):
    with pytest.raises(ConfigError, match="number of bytes"):
        Budget(device=value)
