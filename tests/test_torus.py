"""The order of devices: every ring of an axis goes from neighbour to neighbour."""

import itertools
import math
import types

import pytest

from jaxspeed import rings
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


def hops(a, b, sides):
    """Links between two chips, on a torus."""
    apart = (abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))
    return sum(min(d, side - d) for d, side in zip(apart, sides, strict=True))


@pytest.mark.parametrize(
    "sides, cores",
    [
        ((2, 2), 1),
        ((2, 4), 1),
        ((4, 4), 1),
        ((8, 16), 1),
        ((16, 16), 1),
        ((2, 2, 4), 1),
        ((4, 4, 1), 1),
        ((2, 4, 4), 1),
        ((4, 4, 8), 1),
        ((8, 8, 8), 1),
        ((2, 2, 1), 2),
        ((2, 2, 2), 2),
        ((2, 2, 4), 2),
        ((2, 4, 4), 2),
        ((4, 8, 8), 2),
    ],
)
def test_neighbours_in_a_ring_are_neighbours_on_the_torus(sides, cores):
    devices = chips(sides, cores)
    order = torus_order(devices)
    assert order is not None
    assert {id(device) for device in order} == {id(device) for device in devices}
    found = rings.factor(len(devices), len(sides))
    assert math.prod(ring.size for ring in found) == len(devices)
    for ring in found:
        for source, target in ring.shift(len(devices)):
            assert hops(order[source], order[target], sides) <= 1


@pytest.mark.parametrize(
    "devices",
    [
        chips((3, 3)),  # no cycle
        chips((2, 2))[1:],  # not a box
        chips((2, 2))[:3] + chips((2, 2))[:1],
        chips((1, 1)),
        [types.SimpleNamespace()] * 4,  # not a TPU
    ],
)
def test_where_no_order_is_known(devices):
    assert torus_order(devices) is None


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:8x8", "tpu7x:2x4x4"])
@pytest.mark.parametrize("tensor, replica", [(1, 1), (2, 1), (2, 2), (8, 2)])
def test_an_axis_may_be_a_part_of_a_side(topology, tensor, replica):
    devices = topology_devices(topology)
    mesh = make_mesh(devices=devices, tensor=tensor, replica=replica)
    assert mesh.shape["data"] == len(devices) // tensor // replica
    assert {id(device) for device in mesh.devices.flat} == set(map(id, devices))
