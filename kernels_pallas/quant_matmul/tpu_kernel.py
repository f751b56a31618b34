"""The body of the TPU kernel: a block of x times a block of packed weights.

Codes become bytes of the carrier in registers, and the matrix unit multiplies bfloat16
with them, 256 rows deep, which costs no more than to read bytes. Products are added up
in float32 and scaled after the dot, so no weight is ever rounded.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.quant_matmul.layouts import BLOCK, Native, Slabs
from kernels_pallas.quant_matmul.planner import Plan

Ref = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Arrays, their block specs, or references to their blocks.

    Attributes:
        x: bfloat16 [M, K], or codes of activations.
        data: packed weights of L matrices.
        groups: [L, steps or 1, groups of a step, N] scales of groups, or None.
        zeros: zero points like `groups`, or None.
        column: float32 [L, 1, N], scales of whole columns, or None.
        row: float32 [M, 1], scales of tokens, or None.
    """

    x: Any
    data: Any
    groups: Any = None
    zeros: Any = None
    column: Any = None
    row: Any = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """How data become numbers.

    Attributes:
        layout: of the data.
        carrier: dtype that the matrix unit is given.
        factor: number = carrier * factor.
    """

    layout: Native | Slabs
    carrier: Any
    factor: float

    def read(self, data: Ref, start: int, rows: int) -> Array:
        """`rows` rows of the block from row `start`, in the carrier."""
        if isinstance(self.layout, Native):
            found = data[start : start + rows, :]
            if found.dtype == self.carrier:
                return found
            return pltpu.bitcast(pltpu.bitcast(found, jnp.uint32), self.carrier)
        slabs = []
        for block in range(start // BLOCK, (start + rows) // BLOCK):
            planes = [
                pltpu.bitcast(data[block, plane], jnp.uint32)
                for plane in range(self.layout.planes)
            ]
            slabs += self.layout.split(planes)
        return jnp.concatenate([pltpu.bitcast(x, self.carrier) for x in slabs], axis=0)


def body(
    plan: Plan,
    weights: Weights,
    layer: Ref,
    operands: Operands,
    out: Ref,
    total: Ref,
) -> None:
    """Adds the products of one step to `total`, and writes `out` at the last.

    Args:
        plan, weights: what is known before.
        layer: which matrix; the index maps have used it.
        operands: the blocks of this step.
        out: the block of the result.
        total: float32, the sum over the steps so far.
    """
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    total[...] += _products(plan, weights, operands, step)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        scaled = total[...] * weights.factor
        if operands.column is not None:
            scaled = total[...] * (operands.column[...] * weights.factor)
        if operands.row is not None:
            scaled = scaled * operands.row[...]
        out[...] = scaled.astype(out.dtype)


def _products(plan: Plan, weights: Weights, operands: Operands, step: Array) -> Array:
    """The sum over the rows of this step's block, scaled by groups."""
    span = max(plan.dot, BLOCK)
    first = pl.multiple_of(step * plan.depth, BLOCK) if plan.whole_x else 0
    sums = []
    for start in range(0, plan.depth, span):
        x = operands.x[:, pl.ds(first + start, span)]
        rows = weights.read(operands.data, start, span)
        if plan.scales_weights:
            rows = _scaled(plan, rows, operands.groups, start)
            sums.append(_dot(x, rows))
            continue
        for inner in range(0, span, plan.dot):
            part = x[:, inner : inner + plan.dot]
            product = _dot(part, rows[inner : inner + plan.dot])
            sums.append(_after(plan, operands, product, part, start + inner))
    return functools.reduce(jnp.add, sums).astype(jnp.float32)


def _after(
    plan: Plan, operands: Operands, product: Array, x: Array, start: int
) -> Array:
    """The product of `x` with the rows from `start`, less zero points, times scales."""
    if operands.groups is None:
        return product
    product = product.astype(jnp.float32)
    group = start * operands.groups.shape[0] // plan.depth
    if operands.zeros is not None:
        sums = x.astype(jnp.float32).sum(axis=1, keepdims=True)
        product = product - sums * operands.zeros[group : group + 1, :]
    return product * _scales(operands.groups[group : group + 1, :])


def _scaled(plan: Plan, rows: Array, groups: Ref, start: int) -> Array:
    """Weights times their scales in bfloat16: both have few bits, so it is exact."""
    size = plan.depth // groups.shape[0]
    first, count = start // size, len(rows) // size
    scales = _scales(groups[first : first + count, :]).astype(jnp.bfloat16)
    columns = rows.shape[1]
    spread = jnp.broadcast_to(scales[:, None], (count, size, columns))
    return rows.astype(jnp.bfloat16) * spread.reshape(rows.shape)


def _scales(stored: Array) -> Array:
    """Scales in float32; bytes are exponents of two."""
    if stored.dtype == jnp.uint8:
        return lax.bitcast_convert_type(stored.astype(jnp.int32) << 23, jnp.float32)
    return stored.astype(jnp.float32)


def _dot(x: Array, rows: Array) -> Array:
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    if integers:
        rows = rows.astype(x.dtype)
    return lax.dot_general(
        x,
        rows,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    )
