"""The order of devices: every ring of an axis goes from neighbour to neighbour."""

import itertools
import math
import statistics
import types

import pytest

from jaxspeed import rings
from jaxspeed.chips import CHIPS
from jaxspeed.mesh import make_mesh
from jaxspeed.plan.topology import topology_devices
from jaxspeed.torus import torus_order


def chips(sides, cores=1):
    """Devices of a box of chips, as jax lists them."""
    places = itertools.product(*map(range, sides))
    return [
        types.SimpleNamespace(coords=place, core_on_chip=core)
        for place in places
        for core in range(cores)
    ]


def apart(a, b, sides, chip):
    """Links between two chips along each side."""
    large = 0 < chip.straight_beyond < math.prod(sides)
    for x, y, side in zip(a.coords, b.coords, sides, strict=True):
        closed = not large and side % chip.ring_multiple == 0
        yield min(abs(x - y), side - abs(x - y)) if closed else abs(x - y)


def ring_steps(order, sizes, dims):
    """Devices that send to each other, for every ring of every axis."""
    for axis, size in enumerate(sizes):
        for ring in rings.factor([size], dims):
            for source, target in ring.shift(size):
                senders = order.take([source], axis).flat
                yield from zip(senders, order.take([target], axis).flat, strict=True)


@pytest.mark.parametrize(
    "chip, sides, sizes",
    [
        ("v5e", (2, 2, 1), (4,)),
        ("v5e", (2, 4, 1), (8,)),
        ("v5e", (4, 4, 1), (16,)),
        ("v6e", (16, 16, 1), (256,)),
        ("v5p", (2, 2, 4), (16,)),
        ("v5p", (4, 4, 4), (64,)),
        ("v5p", (4, 4, 8), (128,)),
        ("v5p", (8, 8, 8), (512,)),
        ("tpu7x", (2, 2, 1), (8,)),
        ("tpu7x", (2, 2, 2), (16,)),
        ("tpu7x", (2, 2, 4), (32,)),
        ("tpu7x", (4, 8, 8), (512,)),
        # several axes
        ("v6e", (16, 16, 1), (16, 16)),
        ("v5p", (2, 2, 2), (4, 2)),
        ("v5p", (4, 4, 4), (32, 2)),
        ("v5p", (4, 4, 4), (16, 4)),
        ("v5p", (4, 4, 4), (8, 8)),
        ("v5p", (4, 4, 4), (1, 4, 1, 4, 4)),
        ("v5p", (4, 4, 4), (2, 4, 8)),
        ("tpu7x", (2, 4, 4), (16, 4)),
        ("tpu7x", (2, 4, 4), (8, 8)),
    ],
)
def test_neighbours_in_a_ring_are_neighbours_on_the_torus(chip, sides, sizes):
    devices = chips(sides, cores=2 if chip == "tpu7x" else 1)
    order = torus_order(devices, sizes, CHIPS[chip])
    assert order is not None and order.shape == sizes
    assert {id(device) for device in order.flat} == {id(device) for device in devices}
    for step in ring_steps(order, sizes, CHIPS[chip].torus_dims):
        assert sum(apart(*step, sides, CHIPS[chip])) <= 1


@pytest.mark.parametrize(
    "sides, sizes",
    [
        ((4, 8, 1), (32,)),
        ((8, 8, 1), (64,)),
        ((16, 16, 1), (256,)),
        ((8, 8, 1), (8, 8)),
        ((8, 8, 1), (32, 2)),
        ((16, 16, 1), (32, 8)),
        ((16, 16, 1), (4, 16, 4)),
    ],
)
def test_large_v5e_sends_straight_on(sides, sizes):
    """Other messages would stop computation; nor has it closed sides."""
    order = torus_order(chips(sides), sizes, CHIPS["v5e"])
    assert order is not None
    for step in ring_steps(order, sizes, 2):
        links = sorted(apart(*step, sides, CHIPS["v5e"]))
        assert links[:-1] == [0, 0] and links[-1] in (0, 1, 2, 4, 8)


@pytest.mark.parametrize(
    "chip, sides, sizes, mean",
    [
        ("v5e", (4, 4, 1), (4, 4), 1.5),  # no side of 4 is closed
        ("v6e", (8, 8, 1), (64,), 1.75),
        ("v5p", (8, 8, 8), (64, 8), 1.75),  # boxes of 4x4x4 and 2x2x2
        ("v5p", (16, 16, 16), (4, 128, 8), 2.5),
    ],
)
def test_other_meshes_have_short_ways(chip, sides, sizes, mean):
    """Where no order has neighbours only, far less than row by row."""
    order = torus_order(chips(sides), sizes, CHIPS[chip])
    assert order is not None
    steps = ring_steps(order, sizes, CHIPS[chip].torus_dims)
    found = [sum(apart(*step, sides, CHIPS[chip])) for step in steps]
    assert statistics.mean(found) <= mean


def test_a_mesh_that_boxes_cannot_make():
    assert torus_order(chips((3, 3, 1)), (9,), CHIPS["v5e"]) is not None
    assert torus_order(chips((2, 2, 1)), (3, 1), CHIPS["v5e"]) is None


def test_axes_that_zero_sends_over_together_keep_their_rings():
    sizes = (16, 4)
    order = torus_order(chips((8, 8, 1)), sizes, CHIPS["v5e"])
    assert order is not None
    for ring in rings.factor(sizes, 2):
        for source, target in ring.shift(64):
            step = order.flat[source], order.flat[target]
            links = sorted(apart(*step, (8, 8, 1), CHIPS["v5e"]))
            assert links[:-1] == [0, 0] and links[-1] in (0, 1, 2, 4, 8)


SLICES = chips((2, 2)) + chips((2, 2))
for number, device in enumerate(SLICES):
    device.slice_index = number // 4


@pytest.mark.parametrize(
    "devices",
    [
        SLICES,
        chips((2, 2))[1:],  # not a box
        chips((2, 2))[:3] + chips((2, 2))[:1],
        [types.SimpleNamespace()] * 4,  # not a TPU
    ],
)
def test_where_no_order_is_known(devices):
    assert torus_order(devices, (len(devices),), CHIPS["v5e"]) is None


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:8x8", "tpu7x:2x4x4"])
@pytest.mark.parametrize("tensor, replica", [(1, 1), (2, 1), (2, 2), (8, 2)])
def test_an_axis_may_be_a_part_of_a_side(topology, tensor, replica):
    devices = topology_devices(topology)
    mesh = make_mesh(devices=devices, tensor=tensor, replica=replica)
    assert mesh.shape["data"] == len(devices) // tensor // replica
    assert {id(device) for device in mesh.devices.flat} == set(map(id, devices))
