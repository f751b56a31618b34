"""Rings of shifts against the compiler's own collectives, on simulated devices."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxspeed import rings
from jaxspeed.mesh import make_mesh
from jaxspeed.plan import collectives

MESHES = [dict(data=8), dict(data=2, seq=4), dict(data=3), dict(data=5)]


def mesh_of(sizes):
    count = math.prod(sizes.values())
    return make_mesh(devices=jax.devices()[:count], **sizes), tuple(sizes), count


NUMBERS = [1, 2, 3, 6, 8, 12, 16, 17, 34, 64, 96, 256, 512, 4096]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("number", NUMBERS)
def test_rings_cover_the_axis(number, dims):
    found = rings.factor([number], dims)
    assert math.prod(ring.size for ring in found) == number
    for ring in found:
        members = [device for group in ring.groups(number) for device in group]
        assert sorted(members) == list(range(number))
        pairs = ring.shift(number)
        assert sorted(target for _, target in pairs) == list(range(number))
        for group in ring.groups(number):
            following = dict(pairs)
            assert [following[d] for d in group] == group[1:] + group[:1]


@pytest.mark.parametrize(
    ("number", "dims", "sizes"),
    [
        (16, 2, [16]),
        (32, 2, [8, 4]),
        (64, 2, [8, 8]),
        (256, 2, [16, 16]),
        (8, 3, [8]),
        (16, 3, [16]),
        (32, 3, [4, 4, 2]),
        (64, 3, [4, 4, 4]),
        (256, 3, [8, 8, 4]),
        (512, 3, [8, 8, 8]),
        (34, 3, [2, 17]),
    ],
)
def test_rings_lie_along_the_dims_of_a_torus(number, dims, sizes):
    assert [ring.size for ring in rings.factor([number], dims)] == sizes


def test_each_axis_has_rings_of_its_own():
    found = [(ring.size, ring.stride) for ring in rings.factor([64, 4, 1, 8], 3)]
    assert found == [(8, 1), (4, 8), (4, 32), (4, 128), (4, 512)]


@pytest.mark.parametrize(("torus", "largest"), [(2, 16), (2, 4), (3, 2)])
@pytest.mark.parametrize("shifts_only", [True, False])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gather_is_the_compilers(sizes, shifts_only, torus, largest, monkeypatch):
    monkeypatch.setattr(rings, "LARGEST_GROUP", largest)
    mesh, axes, count = mesh_of(sizes)
    way = rings.factor(list(sizes.values()), torus)
    shapes, dims = [(2, 3), (4, 2, 5), (6,), (2, 1, 5)], [0, 1, 0, 2]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        jax.random.normal(key, (count, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    ]

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(axes), out_specs=P(axes))
    def both(arrays):
        local = [x[0] for x in arrays]
        ours = rings.all_gather(local, axes, way, dims=dims, shifts_only=shifts_only)
        theirs = [
            lax.all_gather(x, axes, axis=dim, tiled=True)
            for x, dim in zip(local, dims, strict=True)
        ]
        return [x[None] for x in ours], [x[None] for x in theirs]

    ours, theirs = both(arrays)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(("torus", "largest"), [(2, 16), (2, 4), (3, 2)])
@pytest.mark.parametrize("last", [3, 4])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_reduce_scatter_is_the_compilers_and_sends_the_least(
    sizes, last, torus, largest, monkeypatch
):
    """With a last dim that halves, the heaviest message goes both ways around."""
    monkeypatch.setattr(rings, "LARGEST_GROUP", largest)
    monkeypatch.setattr(rings, "LANES", 2)
    mesh, axes, count = mesh_of(sizes)
    way = rings.factor(list(sizes.values()), torus)
    shapes, dims = [(2 * count, last), (4, count, last), (count,)], [0, 1, 0]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        jax.random.normal(key, (count, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    ]

    def local(scatter):
        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=P(axes), out_specs=P(axes)
        )
        def run(arrays):
            return [x[None] for x in scatter([x[0] for x in arrays])]

        return run

    ours = local(lambda xs: rings.reduce_scatter(xs, axes, way, dims=dims))
    theirs = local(
        lambda xs: [
            lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
            for x, dim in zip(xs, dims, strict=True)
        ]
    )
    for a, b in zip(ours(arrays), theirs(arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    found = collectives(ours.lower(arrays).compile(), mesh)
    whole = sum(4 * math.prod(shape) for shape in shapes)
    assert sum(each.bytes_sent for each in found) == whole * (count - 1) // count
    assert {each.op for each in found} == {"collective-permute"}


@pytest.mark.parametrize(
    ("widths", "ahead", "back"),
    [
        ([4, 8, 16, 20], 24, 24),  # heavy ones against each other
        ([32, 8], 24, 16),  # the heavy one in halves
        ([34, 4], 34, 4),  # halves would not be whole tiles
    ],
)
def test_both_ways_around_carry_alike(widths, ahead, back, monkeypatch):
    monkeypatch.setattr(rings, "LANES", 4)
    mesh, axes, count = mesh_of(dict(data=8))
    way = rings.factor([count], 2)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(axes))
    def scatter(arrays):
        varying = [lax.pcast(x, axes, to="varying") for x in arrays]
        return rings.reduce_scatter(varying, axes, way, dims=[0] * len(varying))

    arrays = [np.ones((8, width), np.float32) for width in widths]
    text = scatter.lower(arrays).as_text()
    sent = {1: 0, 7: 0}
    for target, columns in re.findall(
        r"collective_permute.*?source_target_pairs = dense<\[\[0, (\d)\].*?"
        r"tensor<1x(\d+)xf32>",
        text,
    ):
        sent[int(target)] += int(columns)
    assert sorted(sent.values()) == sorted((7 * ahead, 7 * back))


@pytest.mark.parametrize("torus", [2, 3])
def test_other_axes_may_differ_too(torus, monkeypatch):
    """Shards that differ over an axis that the rings do not run over."""
    monkeypatch.setattr(rings, "LARGEST_GROUP", 2)
    mesh, way = make_mesh(data=4, tensor=2), rings.factor([4], torus)
    x = jax.random.normal(jax.random.key(0), (8, 6))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=P("data", "tensor"),
        out_specs=P("data", "tensor"),
    )
    def there_and_back(x):
        (whole,) = rings.all_gather([x], ("data",), way, dims=[0], shifts_only=True)
        return rings.reduce_scatter([whole], ("data",), way, dims=[0])[0]

    np.testing.assert_allclose(there_and_back(x), 4 * x, rtol=1e-6)
