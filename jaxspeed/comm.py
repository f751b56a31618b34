"""Collectives under the papers' names: the one place where bytes move.

Every function takes mesh axes by name and works inside `jax.shard_map`. Axes of size
1, and axes that no `shard_map` around the call has (the same model code runs on a
single device), move nothing and leave no instruction in the compiled program. All
collectives are tiled: they concatenate or split an existing dim, never add one.

On TPU, gathers and reduce-scatters are written as rings (`rings`), because the compiler
would send more than they need; elsewhere they are the compiler's own.

Layout comments use JAX's own notation: `[B, S@tensor, D]` is an array whose dim S is
split over mesh axis `tensor`.
"""

import functools
from collections.abc import Sequence

import jax
from jax import lax
from jaxtyping import Array

from jaxspeed import rings
from jaxspeed.chips import Chip, chip_of

Axes = str | tuple[str, ...]

GATHERS_IN_SHIFTS = ("v5p",)
"""TPUs whose compiler overlaps no `all_gather` with compute."""


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def axis_size(axes: Axes) -> int:
    """Number of devices along `axes` here; 1 outside of `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for axis in _names(axes):
        if axis in mesh.manual_axes:
            size *= mesh.shape[axis]
    return size


def axis_index(axes: Axes) -> Array | int:
    """Position of this device along `axes`, the first axis varying slowest."""
    active = _active(axes)
    return lax.axis_index(active) if active else 0


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which `x` may differ between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _active(axes: Axes) -> tuple[str, ...]:
    return tuple(axis for axis in _names(axes) if axis_size(axis) > 1)


def _tpu() -> Chip | None:
    """The TPU that the program is for; None for other devices.

    The program need not run where it is traced.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return chip_of(device) if device is not None and device.platform == "tpu" else None


def vary(x: Array, axes: Axes) -> Array:
    """Marks `x` as differing along `axes`; its gradient then stays local.

    Moves nothing. The backward pass sums what it marks, so code that wants to reduce
    gradients itself marks the parameters before differentiating.
    """
    missing = tuple(axis for axis in _active(axes) if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def all_reduce(x: Array, axes: Axes) -> Array:
    """Sum over `axes`; the result is the same on all of them."""
    active = _active(axes)
    return lax.psum(vary(x, active), active) if active else x


def all_max(x: Array, axes: Axes) -> Array:
    """Maximum over `axes`; not differentiable."""
    active = _active(axes)
    return lax.pmax(vary(x, active), active) if active else x


def all_gather(x: Array, axes: Axes, *, dim: int) -> Array:
    """Concatenates the shards of dim `dim` over `axes`."""
    active = _active(axes)
    if not active:
        return x
    # [..., n@axes, ...] -> [..., n, ...]
    return _all_gather(active, dim % x.ndim, vary(x, active))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather(axes: tuple[str, ...], dim: int, x: Array) -> Array:
    return all_gather_coalesced([x], axes, dims=[dim])[0]


def all_gather_coalesced(
    arrays: Sequence[Array], axes: Axes, *, dims: Sequence[int]
) -> list[Array]:
    """`all_gather` of several arrays in few messages; it has no gradient."""
    active = _active(axes)
    if not active:
        return list(arrays)
    arrays, dims = _ready(arrays, active, dims)
    # [..., n@axes, ...] -> [..., n, ...] each
    if chip := _tpu():
        return rings.all_gather(
            arrays,
            active,
            rings.factor([axis_size(axis) for axis in active], chip.torus_dims),
            dims=dims,
            shifts_only=chip.name in GATHERS_IN_SHIFTS,
        )
    return [
        lax.all_gather(x, active, axis=dim, tiled=True)
        for x, dim in zip(arrays, dims, strict=True)
    ]


def _ready(arrays: Sequence[Array], active: tuple[str, ...], dims: Sequence[int]):
    """Arrays that vary along the active axes, and dims counted from the front."""
    from_front = [dim % x.ndim for x, dim in zip(arrays, dims, strict=True)]
    return [vary(x, active) for x in arrays], from_front


def all_gather_same(x: Array, axes: Axes, *, dim: int) -> Array:
    """`all_gather` whose result is known to be the same on all of `axes`.

    For results that leave `shard_map` unsplit; it has no gradient.
    """
    active = _active(axes)
    if not active:
        return x
    # [..., n@axes, ...] -> [..., n, ...]
    return lax.all_gather(x, active, axis=dim % x.ndim, tiled=True, to="invarying")


def reduce_scatter(x: Array, axes: Axes, *, dim: int) -> Array:
    """Sums over `axes` and leaves each device its shard of dim `dim`."""
    active = _active(axes)
    if not active:
        return x
    # [..., n, ...] partial sums -> [..., n@axes, ...]
    return _reduce_scatter(active, dim % x.ndim, vary(x, active))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce_scatter(axes: tuple[str, ...], dim: int, x: Array) -> Array:
    return reduce_scatter_coalesced([x], axes, dims=[dim])[0]


def reduce_scatter_coalesced(
    arrays: Sequence[Array], axes: Axes, *, dims: Sequence[int]
) -> list[Array]:
    """`reduce_scatter` of several arrays in few messages; it has no gradient."""
    active = _active(axes)
    if not active:
        return list(arrays)
    arrays, dims = _ready(arrays, active, dims)
    # [..., n, ...] partial sums -> [..., n@axes, ...] each
    if chip := _tpu():
        way = rings.factor([axis_size(axis) for axis in active], chip.torus_dims)
        return rings.reduce_scatter(arrays, active, way, dims=dims)
    return [
        lax.psum_scatter(x, active, scatter_dimension=dim, tiled=True)
        for x, dim in zip(arrays, dims, strict=True)
    ]


# Each is the other's transpose, written out so that the backward pass uses rings too.
_all_gather.defvjp(
    lambda axes, dim, x: (_all_gather(axes, dim, x), None),
    lambda axes, dim, _, gradient: (_reduce_scatter(axes, dim, gradient),),
)
_reduce_scatter.defvjp(
    lambda axes, dim, x: (_reduce_scatter(axes, dim, x), None),
    lambda axes, dim, _, gradient: (_all_gather(axes, dim, gradient),),
)


def shard(x: Array, axes: Axes, *, dim: int) -> Array:
    """This device's shard of dim `dim` of an array that every device holds whole."""
    active = _active(axes)
    if not active:
        return x
    dim = dim % x.ndim
    size = x.shape[dim] // axis_size(active)
    # [..., n, ...] -> [..., n@axes, ...], nothing sent
    return lax.dynamic_slice_in_dim(
        vary(x, active), axis_index(active) * size, size, axis=dim
    )
