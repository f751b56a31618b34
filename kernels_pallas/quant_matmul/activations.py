"""Activations of 8 and 4 bits: codes, and one scale for each token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.fp8 import E4M3
from kernels_pallas.quant_matmul.integer import INT4, INT8
from kernels_pallas.quant_matmul.numbers import Integer, Minifloat
from kernels_pallas.quant_matmul.scaling import TINY

KINDS: dict[str, Integer | Minifloat] = {
    "int8": INT8.numbers,
    "int4": INT4.numbers,
    "fp8_e4m3": E4M3,
}
"""What activations may be."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens [M, K] as `codes * scales`.

    Attributes:
        codes: int8, for INT4 too, or float8_e4m3fn; or numbers that are not quantized.
        scales: float32, one for a token, or None.
    """

    codes: Array
    scales: Float[Array, "M 1"] | None

    def scaled(self, product: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """The product of the codes as that of the tokens."""
        return product if self.scales is None else product * self.scales

    def values(self, dtype: Any) -> Float[Array, "M K"]:
        """The codes as numbers; exact in bfloat16."""
        return self.codes.astype(dtype)


def quantize_rows(x: Float[Array, "M K"], kind: str) -> Rows:
    """The largest magnitude of every token to the largest code, ties to even.

    A token with a NaN or an infinity gets an infinite scale, and a result of NaN.
    """
    numbers = KINDS[kind]
    x = x.astype(jnp.float32)
    size = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    scales = size.max(axis=1, keepdims=True) / numbers.largest
    scales = jnp.where(scales < TINY, 1.0, scales)
    codes = numbers.encode(x / scales)
    if isinstance(numbers, Integer):
        return Rows(numbers.decode(codes).astype(jnp.int8), scales)
    return Rows(lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), scales)


def kind_for(format: Format) -> str:
    """Integers with integers, floating point with floating point."""
    return "int8" if isinstance(format.numbers, Integer) else "fp8_e4m3"
