"""Products with quantized weights in plain JAX, for any backend.

Every code is exact in 16 bits, so weights are multiplied as they are and scales follow,
in float32: after the dot, or after the part of it that a group is.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.quant_matmul.layouts import BLOCK, LANES
from kernels_pallas.quant_matmul.tensor import QuantizedTensor


def matmul(
    x: Float[Array, "M K"],
    w: QuantizedTensor,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)`, summed in float32."""
    w = w.take(layer)
    if x.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)
    x = pad_dim(x, 1, w.padded[0])
    if w.group is None:
        product = _by_column(x, w)
    elif w.group < LANES:
        product = _by_small_groups(x, w)
    else:
        product = _by_groups(x, w)
    return product[:, : w.shape[-1]].astype(out_dtype)


def _by_column(x: Array, w: QuantizedTensor) -> Array:
    product = _dot("mk,kn->mn", x, w.format.values(w.data).astype(x.dtype))
    if w.zeros is not None:
        product = product - _sum(x)[:, None] * w.zeros
    return product * w.scale_values()


def _by_small_groups(x: Array, w: QuantizedTensor) -> Array:
    """A number of 4 bits times a scale of one byte is exact in 16 bits."""
    assert w.group is not None
    scales = jnp.repeat(w.format.scaling.read(w.scales), w.group, axis=0)
    weights = (w.format.values(w.data) * scales).astype(x.dtype)
    product = _dot("mk,kn->mn", x, weights)
    return product if w.tensor_scale is None else product * w.tensor_scale


def _by_groups(x: Array, w: QuantizedTensor) -> Array:
    """A loop over parts of K, so that products of groups are never all there."""
    assert w.group is not None
    rows, columns = w.padded
    part = math.lcm(BLOCK, w.group)
    parts, groups = rows // part, part // w.group
    scales = w.scale_values().reshape(parts, groups, 1, columns)
    zeros = None if w.zeros is None else w.zeros.reshape(scales.shape)
    data = w.data.reshape(parts, -1, *w.data.shape[1:])
    x = x.reshape(len(x), parts, groups, w.group).transpose(1, 2, 0, 3)

    def add(total: Array, each: tuple) -> tuple[Array, None]:
        x, data, scales, zeros = each
        values = w.format.values(data).astype(x.dtype)
        values = values.reshape(groups, w.group, columns)
        product = _dot("gmk,gkn->gmn", x, values)
        if zeros is not None:
            product = product - _sum(x)[..., None] * zeros
        return total + (product * scales).sum(axis=0), None

    total = vary_like(jnp.zeros((x.shape[2], columns), jnp.float32), x, data)
    return lax.scan(add, total, (x, data, scales, zeros))[0]


def _sum(x: Array) -> Array:
    return x.astype(jnp.float32).sum(axis=-1)


def _dot(equation: str, x: Array, weights: Array) -> Array:
    return jnp.einsum(
        equation,
        x,
        weights,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
