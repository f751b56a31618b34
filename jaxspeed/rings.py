"""Gathers and reduce-scatters written out for TPU, whose compiler departs from them.

It turns `psum_scatter` into an all-reduce in most shapes, and an `all_gather` over many
chips too: twice the bytes, and whole gradients in memory. What it keeps as written are
neighbour shifts, asynchronous on every generation, and gathers within small groups. So
axes of n devices are factored into rings, `n = n_1 n_2 ...`, and each stage runs within
its ring:

    gather          fastest ring first; the last stage carries most of the bytes. It is
                    one `all_gather` within groups where the compiler overlaps that
                    with compute (v5e: fused with matmuls; v6e, tpu7x: on the
                    SparseCore), and shifts both ways around where not (v5p)
    reduce-scatter  slowest ring first, shifts only: a partial sum travels around the
                    ring and takes up each device's part

Both send (n-1)/n of the whole array, the least possible (Thakur et al., 2005). Arrays
that travel together share their messages, so that a layer costs few of them; sums go
one way around a ring, so messages are shared out evenly over both ways.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Axes = tuple[str, ...]

LARGEST_GROUP = 16
"""Up to here the TPU compilers keep an `all_gather` (seen on v5e, v5p, v6e, tpu7x)."""


HEAVY = 0.6
"""A message with more than this part of all bytes is cut in two."""

LANES = 128
"""Columns of a tile of a TPU: halves of an array are whole tiles."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """One stage: devices whose index differs by multiples of `stride`.

    Attributes:
        size: devices in the ring.
        stride: distance of neighbours, in device indices along the axes.
    """

    size: int
    stride: int

    def position(self, index: Array) -> Array:
        """Place in its ring of the device with `index`."""
        return index // self.stride % self.size

    def shift(self, num_devices: int, by: int = 1) -> list[tuple[int, int]]:
        """Source and target of messages `by` places further in each ring."""

        def target(device: int) -> int:
            place = device // self.stride % self.size
            return device + ((place + by) % self.size - place) * self.stride

        return [(device, target(device)) for device in range(num_devices)]

    def groups(self, num_devices: int) -> list[list[int]]:
        """The members of each ring, in order."""
        return [
            [start + offset + place * self.stride for place in range(self.size)]
            for start in range(0, num_devices, self.stride * self.size)
            for offset in range(self.stride)
        ]


def factor(sizes: Sequence[int], dims: int) -> list[Ring]:
    """Rings that together make up mesh axes, fastest first.

    Each axis of few devices is one ring, whose many small messages hide better than a
    few large ones; a larger one is about as many rings as the torus has dims, the
    fastest the largest.

    Args:
        sizes: of the axes, the one that varies slowest first.
        dims: of the torus.
    """
    rings, stride = [], 1
    for axis in reversed(sizes):
        for size in _ring_sizes(axis, dims):
            rings.append(Ring(size, stride))
            stride *= size
    return rings


def _ring_sizes(num_devices: int, dims: int) -> list[int]:
    sizes: list[int] = []
    if num_devices <= LARGEST_GROUP:
        dims = 1
    while num_devices > 1:
        left = max(1, dims - len(sizes))
        sizes.append(_divisor_near(num_devices, num_devices ** (1 / left)))
        num_devices //= sizes[-1]
    return sizes


def _divisor_near(number: int, root: float) -> int:
    """The first divisor not below `root`, within `LARGEST_GROUP` if possible."""
    divisors = [n for n in range(2, number + 1) if number % n == 0]
    small = [n for n in divisors if n <= LARGEST_GROUP] or divisors[:1]
    return next((n for n in small if n >= root - 1e-9), small[-1])


@dataclasses.dataclass(frozen=True)
class _Bundle:
    """Arrays that travel as one message: one below the other, as matrices.

    Attributes:
        shapes: of the arrays; all have the same last dim.
    """

    shapes: tuple[tuple[int, ...], ...]

    def pack(self, arrays: list[Array]) -> Array:
        """One matrix of all."""
        matrices = [x.reshape(-1, x.shape[-1]) for x in arrays]
        return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices)

    def unpack(self, matrix: Array) -> list[Array]:
        """The arrays again."""
        arrays, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape[:-1])
            arrays.append(matrix[start:end].reshape(shape))
            start = end
        return arrays


def _bundles(arrays: list[Array], *kinds: list[int]) -> list[list[int]]:
    """Which arrays travel together: those of one dtype and alike in all `kinds`."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for number, (x, *kind) in enumerate(zip(arrays, *kinds, strict=True)):
        together.setdefault((x.dtype, *kind), []).append(number)
    return list(together.values())


def all_gather(
    arrays: list[Array],
    axes: Axes,
    rings: list[Ring],
    *,
    dims: list[int],
    shifts_only: bool,
) -> list[Array]:
    """Concatenates the shards of each array over `axes`.

    Args:
        arrays: this device's shards, of at least one dim, varying over `axes`.
        axes: mesh axes, the first varying slowest.
        rings: that make up these axes, from `factor`.
        dims: for each array the dim to concatenate, at least 0.
        shifts_only: the last stage consists of shifts as well.
    """
    size = math.prod(ring.size for ring in rings)
    for ring in rings if shifts_only else rings[:-1]:
        arrays = _in_bundles(
            _gather_by_shifts, arrays, axes, size, ring, dims, [0] * len(arrays)
        )
    if shifts_only:
        return arrays
    groups = rings[-1].groups(size)
    return [
        # [..., n@ring, ...] -> [..., n, ...]
        lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups)
        for x, dim in zip(arrays, dims, strict=True)
    ]


def reduce_scatter(
    arrays: list[Array], axes: Axes, rings: list[Ring], *, dims: list[int]
) -> list[Array]:
    """Sums each array over `axes`, made up of `rings`; leaves each device its shard."""
    size = math.prod(ring.size for ring in rings)
    two_ways = any(ring.size > 2 for ring in rings)
    halved = _heaviest(arrays, dims) if two_ways else set()
    pieces, of, half = [], [], []
    for number, x in enumerate(arrays):
        parts = jnp.split(x, 2, axis=-1) if number in halved else [x]
        pieces += parts
        of += [number] * len(parts)
        half += range(len(parts))
    at = [dims[number] for number in of]
    for ring in reversed(rings):
        pieces = _in_bundles(_scatter_by_shifts, pieces, axes, size, ring, at, half)
    shards: list[list[Array]] = [[] for _ in arrays]
    for number, piece in zip(of, pieces, strict=True):
        shards[number].append(piece)
    return [x[0] if len(x) == 1 else jnp.concatenate(x, axis=-1) for x in shards]


def _heaviest(arrays: list[Array], dims: list[int]) -> set[int]:
    """Those arrays that go half one way around and half the other.

    They are the ones of a message that clearly outweighs all others together.
    """
    together = _bundles(arrays, [x.shape[-1] for x in arrays])
    weights = [sum(arrays[i].nbytes for i in members) for members in together]
    if max(weights) <= HEAVY * sum(weights):
        return set()
    return {
        i
        for i in together[weights.index(max(weights))]
        if dims[i] < arrays[i].ndim - 1 and arrays[i].shape[-1] % (2 * LANES) == 0
    }


def _in_bundles(
    stage: Any,
    arrays: list[Array],
    axes: Axes,
    size: int,
    ring: Ring,
    dims: list[int],
    apart: list[int],
) -> list[Array]:
    """One stage for all arrays; those whose messages look alike travel together."""
    parts = ring.size if stage is _scatter_by_shifts else 1
    columns = [
        x.shape[-1] // (parts if dim == x.ndim - 1 else 1)
        for x, dim in zip(arrays, dims, strict=True)
    ]
    done: dict[int, Array] = {}
    for members, direction in _directions(arrays, _bundles(arrays, columns, apart)):
        chosen, at = [arrays[i] for i in members], [dims[i] for i in members]
        results = stage(chosen, axes, size, ring, at, direction)
        done |= dict(zip(members, results, strict=True))
    return [done[number] for number in range(len(arrays))]


def _directions(
    arrays: list[Array], together: list[list[int]]
) -> list[tuple[list[int], int]]:
    """The way around its ring for each message, heavy ones against each other."""
    weights = [sum(arrays[i].nbytes for i in members) for members in together]
    loads, ways = {1: 0, -1: 0}, {}
    for number in sorted(range(len(together)), key=lambda each: -weights[each]):
        ways[number] = min(loads, key=lambda way: loads[way])
        loads[ways[number]] += weights[number]
    return [(members, ways[number]) for number, members in enumerate(together)]


def _gather_by_shifts(
    shards: list[Array],
    axes: Axes,
    size: int,
    ring: Ring,
    dims: list[int],
    direction: int,
) -> list[Array]:
    place = ring.position(lax.axis_index(axes))
    bundle = _Bundle(tuple(x.shape for x in shards))

    def room(x: Array, dim: int) -> Array:
        shape = [*x.shape[:dim], x.shape[dim] * ring.size, *x.shape[dim + 1 :]]
        return lax.pcast(jnp.zeros(shape, x.dtype), axes, to="varying")

    def put(wholes: list[Array], shards: list[Array], steps_back: int) -> list[Array]:
        where = (place - direction * steps_back) % ring.size
        return [
            lax.dynamic_update_slice_in_dim(whole, x, where * x.shape[dim], axis=dim)
            for whole, x, dim in zip(wholes, shards, dims, strict=True)
        ]

    wholes = [room(x, dim) for x, dim in zip(shards, dims, strict=True)]
    wholes = put(wholes, shards, 0)
    onward = back = bundle.pack(shards)
    for step in range(1, ring.size // 2 + 1):
        # every shard moves to the next device of its ring, and to the one before
        onward = lax.ppermute(onward, axes, ring.shift(size, direction))
        wholes = put(wholes, bundle.unpack(onward), step)
        if 2 * step < ring.size:
            back = lax.ppermute(back, axes, ring.shift(size, -direction))
            wholes = put(wholes, bundle.unpack(back), -step)
    return wholes


def _scatter_by_shifts(
    arrays: list[Array],
    axes: Axes,
    size: int,
    ring: Ring,
    dims: list[int],
    direction: int,
) -> list[Array]:
    place = ring.position(lax.axis_index(axes))

    def parts(steps_back: int) -> list[Array]:
        where = (place - direction * steps_back) % ring.size
        lengths = [
            x.shape[dim] // ring.size for x, dim in zip(arrays, dims, strict=True)
        ]
        return [
            lax.dynamic_slice_in_dim(x, where * length, length, axis=dim)
            for x, length, dim in zip(arrays, lengths, dims, strict=True)
        ]

    # The sum of part p starts at the device after p and ends at p, once around.
    first = parts(1)
    bundle = _Bundle(tuple(x.shape for x in first))
    total = bundle.pack(first)
    for step in range(2, ring.size + 1):
        # [..., n / ring, ...] partial sums to the next device of the ring
        total = lax.ppermute(total, axes, ring.shift(size, direction))
        total = total + bundle.pack(parts(step))
    return bundle.unpack(total)
