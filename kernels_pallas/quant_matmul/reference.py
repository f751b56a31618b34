"""The meaning of a product with quantized weights: float32, weights written out."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul.tensor import QuantizedTensor, padded_values


def matmul(
    x: Float[Array, "M K"],
    w: QuantizedTensor,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)`."""
    w = w.take(layer)
    rows, columns = w.shape
    weights = padded_values(w)[:rows, :columns]
    product = jnp.dot(x.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST)
    return product.astype(out_dtype)
