"""Grouped products in plain JAX: a loop over the tiles that hold rows of a group.

`jax.lax.ragged_dot` multiplies every row with every group where the platform has no
kernel for it (32 times the work with 32 groups on CPU), this one only border tiles
twice.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.grouped_matmul import schedule
from kernels_pallas.grouped_matmul.weights import Weights

TILE = 128


def product(
    x: Float[Array, "M K"],
    weights: Weights,
    sizes: Int[Array, " G"],
    *,
    transposed: bool,
) -> Float[Array, "M N"]:
    """x[group] w[group], or with `transposed` x[group] w[group]^T, [M, N] -> [M, K]."""
    rows, tile = x.shape[0], min(TILE, x.shape[0])
    steps = schedule.of_groups(sizes, rows, tile)
    _, depth, columns = weights.padded
    depth, columns = (columns, depth) if transposed else (depth, columns)
    padded = pad_dim(_pad(x, tile), 1, depth)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))

    def visit(out: Array, group: Array, first: Array, mine: Array) -> Array:
        part = lax.dynamic_slice_in_dim(padded, first, tile)
        scales = weights.scales(group)
        if transposed and scales is not None:
            part = (part.astype(jnp.float32) * scales).astype(x.dtype)
        result = _dot(part, weights.numbers(group, x.dtype), dims)
        if not transposed and scales is not None:
            result = result * scales
        before = lax.dynamic_slice_in_dim(out, first, tile)
        result = jnp.where(mine[:, None], result.astype(x.dtype), before)
        return lax.dynamic_update_slice_in_dim(out, result, first, 0)

    zeros = jnp.zeros((padded.shape[0], columns), x.dtype)
    zeros = vary_like(zeros, x, *weights.arrays, sizes)
    out = _over_steps(steps, tile, visit, zeros)
    return out[:rows, : weights.shape[1 if transposed else 2]]


def weight_gradient(
    x: Float[Array, "M K"], d_out: Float[Array, "M N"], sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """x[group]^T d_out[group], in x's dtype, summed in float32."""
    rows, tile = x.shape[0], min(TILE, x.shape[0])
    steps = schedule.of_groups(sizes, rows, tile)
    left, right = _pad(x, tile), _pad(d_out, tile)

    def visit(out: Array, group: Array, first: Array, mine: Array) -> Array:
        a, b = (
            jnp.where(mine[:, None], lax.dynamic_slice_in_dim(part, first, tile), 0)
            for part in (left, right)
        )
        added = _dot(a, b, (((0,), (0,)), ((), ())))
        before = lax.dynamic_index_in_dim(out, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(out, before + added, group, 0)

    shape = (sizes.shape[0], x.shape[1], d_out.shape[1])
    zeros = vary_like(jnp.zeros(shape, jnp.float32), x, d_out, sizes)
    return _over_steps(steps, tile, visit, zeros).astype(x.dtype)


def _over_steps(
    steps: schedule.Steps,
    tile: int,
    visit: Callable[[Array, Array, Array, Array], Array],
    zeros: Array,
) -> Array:
    """Folds `visit(result, group, first row, rows that are the group's)`."""

    def body(step: Array, result: Array) -> Array:
        group, first = steps.group[step], steps.tile[step] * tile
        place = first + jnp.arange(tile, dtype=jnp.int32)
        mine = (place >= steps.start[group]) & (place < steps.end[group])
        return visit(result, group, first, mine)

    return lax.fori_loop(jnp.int32(0), steps.count[0], body, zeros)


def _pad(x: Array, tile: int) -> Array:
    return pad_dim(x, 0, -(-x.shape[0] // tile) * tile)


def _dot(x: Array, y: Array, dims: tuple) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dims, precision=precision, preferred_element_type=jnp.float32
    )
