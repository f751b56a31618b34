"""Time on the links of permutes and group collectives, on grids known by hand."""

import types

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxspeed.chips import CHIPS
from jaxspeed.plan import network
from jaxspeed.plan.network import Grid

V5P = CHIPS["v5p"]
ONE_SECOND = int(V5P.link_bytes_per_second)


def grid(sizes, ring=True, devices_per_chip=1):
    places = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    places = places.repeat(devices_per_chip, axis=0)
    return Grid(sizes, (ring,) * len(sizes), places, np.zeros(len(places), int))


def ring(n, step=1):
    return tuple((i, (i + step) % n) for i in range(n))


@pytest.mark.parametrize(
    ("place", "pairs", "seconds"),
    [
        (grid((8,)), ring(8), 1),
        (grid((8,)), ring(8, -1), 1),
        (grid((8,)), ring(8, 3), 3),
        (grid((8,)), ring(8, 5), 3),  # the short way round
        (grid((8,), ring=False), ring(8), 1),  # back along the idle direction
        (grid((8,), ring=False), ring(8, 2), 2),
        # Rows of 4: the ends of rows are 4 steps from the next row's start.
        (grid((2, 4), ring=False), ring(8), 1),
        (grid((4,), devices_per_chip=2), ring(8), 1),  # within a chip is no link
        (grid((4,), devices_per_chip=2), ring(8, 2), 2),  # two devices share a link
        (grid((2,), devices_per_chip=2), ((0, 1), (1, 0)), 1 / 6),
    ],
)
def test_permute(place, pairs, seconds):
    found = network.permute(place, V5P, pairs, ONE_SECOND)
    assert found.seconds == pytest.approx(seconds)


def test_opposite_rings_use_different_links():
    up, down = (
        network.permute(grid((8,)), V5P, ring(8, step), ONE_SECOND) for step in (1, -1)
    )
    assert not set(up.links) & set(down.links)


@pytest.mark.parametrize(
    ("place", "op", "group", "seconds"),
    [
        (grid((8,)), "all-gather", range(8), 1 / 2),
        (grid((8,), ring=False), "all-gather", range(8), 1),
        (grid((4, 4, 4)), "all-gather", range(64), 1 / 6),
        (grid((4, 4, 4)), "all-reduce", range(0, 64, 16), 1 / 2),
        (grid((4, 4, 4)), "reduce-scatter", range(0, 32, 16), 1),  # part of a ring
        (grid((2, 2)), "all-gather", range(4), 1 / 2),  # one link to each neighbour
        (grid((4,), devices_per_chip=2), "all-gather", range(8), 1 / 2),
        (grid((4,), devices_per_chip=2), "all-gather", range(0, 8, 2), 1),
        # An eighth of the array to each; half of all that crosses the middle, over
        # two links: 8 / 7 seconds of payload * 8 / 4 / 2.
        (grid((8,)), "all-to-all", range(8), 8 / 7),
    ],
)
def test_group(place, op, group, seconds):
    found = network.group_collective(place, V5P, op, (tuple(group),), ONE_SECOND)
    assert found.seconds == pytest.approx(seconds)


def test_switch_is_shared_by_all():
    chip = CHIPS["h100"]
    place = network.grid_of(AbstractMesh((4, 2), ("data", "tensor")), chip)
    sent = int(chip.link_bytes_per_second)
    one = network.permute(place, chip, ((0, 1), (1, 0)), sent)
    two = network.group_collective(place, chip, "all-gather", ((0, 2, 4, 6),), sent)
    assert one.seconds == two.seconds == pytest.approx(1)
    assert set(one.links) == set(two.links)


def device(**attributes):
    return types.SimpleNamespace(**attributes)


def fake_mesh(devices):
    return types.SimpleNamespace(
        devices=np.array(devices), shape={"data": len(devices)}, size=len(devices)
    )


def test_other_slices_are_reached_over_the_network():
    devices = [
        device(coords=[x, 0, 0], slice_index=index) for index in (0, 1) for x in (0, 1)
    ]
    place = network.grid_of(fake_mesh(devices), V5P)  # pyright: ignore
    inside = network.permute(place, V5P, ((0, 1), (2, 3)), 1000)
    across = network.permute(place, V5P, ((0, 2), (1, 3)), 1000)
    assert inside.seconds == pytest.approx(1000 / V5P.link_bytes_per_second)
    assert across.seconds == pytest.approx(1000 / V5P.network_bytes_per_second)
    gathered = network.group_collective(place, V5P, "all-gather", ((0, 1, 2, 3),), 1000)
    assert gathered.seconds == across.seconds


@pytest.mark.parametrize(
    ("chip", "side", "closed"),
    [("v5e", 4, False), ("v5e", 16, True), ("v5p", 4, True), ("v5p", 2, False)],
)
def test_which_sides_close_to_rings(chip, side, closed):
    devices = [device(coords=[x, 0, 0], slice_index=0) for x in range(side)]
    place = network.grid_of(fake_mesh(devices), CHIPS[chip])  # pyright: ignore
    assert (place.sizes, place.rings[1]) == ((1, side, 1, 1), closed)
