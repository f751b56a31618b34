"""Grouped products on TPU (Pallas Mosaic).

The grid's steps are the visits of `schedule`, read from scalar memory before the blocks
of a step are fetched. Neighbouring visits of one tile write the same block of the
result, each its own rows, so it goes to HBM once. Tiles need not divide anything: what
is read beyond the end of rows and columns is not written, and beyond the end of the
summed dim it is masked.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.arrays import pad_dim
from kernels_pallas.grouped_matmul import plan, schedule
from kernels_pallas.grouped_matmul.plan import Sizes, Tiles
from kernels_pallas.grouped_matmul.weights import Weights

Ref = Any


def product(
    x: Float[Array, "M K"], weights: Weights, sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """x[group] w[group]."""
    return _product(x, weights, sizes, transposed=False)


def input_gradient(
    d_out: Float[Array, "M N"], weights: Weights, sizes: Int[Array, " G"]
) -> Float[Array, "M K"]:
    """d_out[group] w[group]^T."""
    return _product(d_out, weights, sizes, transposed=True)


def weight_gradient(
    x: Float[Array, "M K"], d_out: Float[Array, "M N"], sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """x[group]^T d_out[group], in x's dtype."""
    rows, depth = x.shape
    problem = Sizes(
        rows, depth, d_out.shape[1], sizes.shape[0], jnp.dtype(x.dtype).itemsize
    )
    tiles = plan.weight_tiles(problem)
    steps = schedule.of_groups(sizes, rows, tiles.rows)
    grid = (
        -(-depth // tiles.depth),
        -(-problem.columns // tiles.columns),
        steps.group.shape[0],
    )
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=grid,
        in_specs=[
            pl.BlockSpec(
                (tiles.rows, tiles.depth), lambda k, n, s, group, tile, *_: (tile[s], k)
            ),
            pl.BlockSpec(
                (tiles.rows, tiles.columns),
                lambda k, n, s, group, tile, *_: (tile[s], n),
            ),
        ],
        out_specs=pl.BlockSpec(
            (None, tiles.depth, tiles.columns),
            lambda k, n, s, group, *_: (group[s], k, n),
        ),
        scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
    )
    run = pl.pallas_call(
        functools.partial(_weight_gradient_body, tiles),
        grid_spec=specs,
        out_shape=_struct((sizes.shape[0], depth, problem.columns), x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(problem),
        name="grouped_matmul_dw",
    )
    return run(*_scalars(steps), x, d_out)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the body of a product is told: tiles of x, w and the result.

    Attributes:
        tiles: rows, summed dim and columns of a step.
        depth: the whole summed dim.
        groups: how many.
        transposed: whether the tile of w is [columns, depth].
        weights: how it is loaded.
    """

    tiles: Tiles
    depth: int
    groups: int
    transposed: bool
    weights: Weights

    @property
    def depth_tiles(self) -> int:
        """Steps along the summed dim."""
        return -(-self.depth // self.tiles.depth)

    def depth_at(self, k: Any, group: Any) -> Any:
        """Tile of the summed dim; rows of no group fetch nothing new."""
        return jnp.where(group < self.groups, k, self.depth_tiles - 1)

    def weight_place(self, n: Any, s: Any, k: Any, group: Ref, *_: Ref) -> Any:
        """Which tile of which group's weights a step reads."""
        depth = self.depth_at(k, group[s])
        found = jnp.minimum(group[s], self.groups - 1)
        return (found, n, depth) if self.transposed else (found, depth, n)

    def weight_specs(self) -> list[pl.BlockSpec]:
        """Blocks of the weights' arrays."""
        depth, columns = self.tiles.depth, self.tiles.columns
        if self.transposed:
            depth, columns = columns, depth
        return self.weights.specs(depth, columns, self.weight_place)


def _product(x: Array, weights: Weights, sizes: Array, *, transposed: bool) -> Array:
    (_, depth, columns), shape = weights.padded, weights.shape
    depth, columns = (columns, depth) if transposed else (depth, columns)
    x = pad_dim(x, 1, depth)
    rows, groups = x.shape[0], shape[0]
    problem = Sizes(rows, depth, columns, groups, jnp.dtype(x.dtype).itemsize)
    tiles = plan.product_tiles(problem)
    steps = schedule.of_outputs(sizes, rows, tiles.rows)
    kernel = _Product(tiles, depth, groups, transposed, weights)
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(-(-columns // tiles.columns), steps.group.shape[0], kernel.depth_tiles),
        in_specs=[
            pl.BlockSpec(
                (tiles.rows, tiles.depth),
                lambda n, s, k, group, tile, *_: (
                    tile[s],
                    kernel.depth_at(k, group[s]),
                ),
            ),
            *kernel.weight_specs(),
        ],
        out_specs=pl.BlockSpec(
            (tiles.rows, tiles.columns), lambda n, s, k, group, tile, *_: (tile[s], n)
        ),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)],
    )
    run = pl.pallas_call(
        functools.partial(_product_body, kernel),
        grid_spec=specs,
        out_shape=_struct((rows, columns), x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=_cost(problem),
        name="grouped_matmul_dx" if transposed else "grouped_matmul",
    )
    out = run(*_scalars(steps), x, *weights.arrays)
    return out[:, : shape[1 if transposed else 2]]


def _product_body(kernel: _Product, *refs: Ref) -> None:
    group, tile, start, end, count, x, *weight_refs, out, summed = refs
    s, k = pl.program_id(1), pl.program_id(2)
    here, active = group[s], s < count[0]
    grouped = active & (here < kernel.groups)

    def multiply() -> Array:
        left, right = x[...], kernel.weights.load(weight_refs)
        scales = kernel.weights.load_scales(weight_refs)
        if kernel.transposed and scales is not None:
            left = (left.astype(jnp.float32) * scales).astype(left.dtype)
        axis = 1 if kernel.transposed else 0
        if kernel.depth % kernel.tiles.depth:
            valid = kernel.depth - k * kernel.tiles.depth
            left, right = _keep(left, 1, valid), _keep(right, axis, valid)
        product = _dot(left, right, (((1,), (axis,)), ((), ())))
        return product if kernel.transposed or scales is None else product * scales

    def keep(result: Array) -> None:
        first = tile[s] * kernel.tiles.rows
        mine = _between(out.shape, start[here] - first, end[here] - first)
        kept = jnp.where(mine, result, out[...].astype(jnp.float32))
        out[...] = kept.astype(out.dtype)

    @pl.when(active & ~grouped & (k == 0))
    def _() -> None:
        keep(jnp.zeros(out.shape, jnp.float32))

    if kernel.depth_tiles == 1:
        pl.when(grouped)(lambda: keep(multiply()))
        return

    @pl.when(grouped & (k == 0))
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    @pl.when(grouped)
    def _() -> None:
        summed[...] += multiply()

    @pl.when(grouped & (k == kernel.depth_tiles - 1))
    def _() -> None:
        keep(summed[...])


def _weight_gradient_body(tiles: Tiles, *refs: Ref) -> None:
    group, tile, start, end, count, x, d_out, out, summed = refs
    s = pl.program_id(2)
    here, active = group[s], s < count[0]
    first = tile[s] * tiles.rows
    begin, stop = start[here] - first, end[here] - first
    opens = (s == 0) | (group[jnp.maximum(s - 1, 0)] != here)
    closes = (s == count[0] - 1) | (
        group[jnp.minimum(s + 1, pl.num_programs(2) - 1)] != here
    )

    @pl.when(active & opens)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    def add(left: Array, right: Array) -> None:
        summed[...] += _dot(left, right, (((0,), (0,)), ((), ())))

    whole = (begin <= 0) & (stop >= tiles.rows)

    @pl.when(active & whole)
    def _() -> None:
        add(x[...], d_out[...])

    @pl.when(active & ~whole & (stop > begin))
    def _() -> None:
        # Both sides: a row of another group may hold an infinity.
        left, right = x[...], d_out[...]
        add(
            _where(_between(left.shape, begin, stop), left),
            _where(_between(right.shape, begin, stop), right),
        )

    @pl.when(active & closes)
    def _() -> None:
        out[...] = summed[...].astype(out.dtype)


def _between(shape: tuple[int, ...], begin: Any, stop: Any) -> Array:
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= begin) & (row < stop)


def _keep(x: Array, axis: int, size: Any) -> Array:
    """`x` with zeros from `size` on: what was read there is of no array."""
    return _where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < size, x)


def _where(mask: Array, x: Array) -> Array:
    """Selected in 32 bits: v5e has no comparison results of 16-bit vectors."""
    return jnp.where(mask, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _dot(x: Array, y: Array, dims: Any) -> Array:
    """Float32; narrow numbers enter the dot with bfloat16 as they are."""
    if x.dtype == jnp.float32:
        y = y.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _scalars(steps: schedule.Steps) -> list[Array]:
    return jax.tree.leaves(steps)


def _struct(shape: tuple[int, ...], like: Array) -> jax.ShapeDtypeStruct:
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=varying)


def _cost(sizes: Sizes) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=sizes.flops, bytes_accessed=sizes.bytes, transcendentals=0
    )
