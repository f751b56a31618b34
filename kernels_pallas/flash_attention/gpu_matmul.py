"""The tensor core's products on GPU, of one warpgroup."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float


def multiply(left: Any, right: Any) -> Float[Array, "M N"]:
    """The product of `left` [M, K] and `right` [N, K] transposed, in shared memory."""

    def product(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        return accumulator[...]

    shape = (left.shape[0], right.shape[0])
    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def accumulate(
    total: Float[Array, "M N"], left: Float[Array, "M K"], right: Any
) -> Float[Array, "M N"]:
    """`total` plus the product of `left`, in registers, and `right` [K, N], in memory.

    The interpreter of Mosaic GPU has no product with an operand in registers, so tests
    that interpret a kernel put another function here.
    """

    def add(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, left, right)

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(total)
    return pl.run_state(add)(accumulator)
