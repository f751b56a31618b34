"""The meaning of a grouped product in plain jnp, float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.weights import Stored
from kernels_pallas.quant_matmul import QuantizedTensor, dequantize


def group_of_rows(sizes: Int[Array, " G"], rows: int) -> Int[Array, " M"]:
    """The group of each row; G for a row after the last group."""
    place = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(sizes), place, side="right").astype(jnp.int32)


def product(
    x: Float[Array, "M K"], w: Stored, sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """Row i of x times the matrix of its group, in x's dtype; zeros without a group."""
    group = group_of_rows(sizes, x.shape[0])
    if isinstance(w, QuantizedTensor):
        w = dequantize(w, jnp.float32)
    chosen = w.astype(jnp.float32)[jnp.minimum(group, w.shape[0] - 1)]
    out = jnp.einsum(
        "mk,mkn->mn",
        x.astype(jnp.float32),
        chosen,
        precision=lax.Precision.HIGHEST,
    )
    return jnp.where((group < w.shape[0])[:, None], out, 0).astype(x.dtype)
