"""What the code of a weight means: small integers and small floating-point numbers.

A code is a `uint8` with unused high bits zero. Encoding rounds to nearest, ties to
even, and saturates, in arithmetic that is exact in float32 on every backend: a
conversion by the hardware may round twice or flush small numbers.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8


@dataclasses.dataclass(frozen=True)
class Integer:
    """Two's complement integers.

    Attributes:
        bits: of a code.
    """

    bits: int

    @property
    def largest(self) -> float:
        """The largest magnitude that symmetric quantization uses: 7 or 127."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def smallest(self) -> float:
        """The least integer, which only asymmetric quantization uses: -8 or -128."""
        return -self.largest - 1

    def encode(self, x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
        """The codes of the integers nearest to `x`; NaN becomes 0."""
        whole = jnp.clip(jnp.round(x), self.smallest, self.largest)
        whole = jnp.where(jnp.isnan(x), 0.0, whole).astype(jnp.int32)
        return (whole & (2**self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
        """float32."""
        unused = 32 - self.bits
        return ((codes.astype(jnp.int32) << unused) >> unused).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Minifloat:
    """Sign, exponent and mantissa, in this order from the highest bit.

    Attributes:
        exponent, mantissa: bits of each.
        bias: of the exponent.
        top: the code of the largest number; what is above it is not a number.
    """

    exponent: int
    mantissa: int
    bias: int
    top: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def largest(self) -> float:
        """The number of code `top`."""
        mantissa = 2**self.mantissa + self.top % 2**self.mantissa
        exponent = (self.top >> self.mantissa) - self.bias - self.mantissa
        return float(mantissa) * 2.0**exponent

    def encode(self, x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
        """The codes of the numbers nearest to `x`; there is one zero, and NaN is it."""
        x = x.astype(jnp.float32)
        size = jnp.abs(x)
        stored = lax.bitcast_convert_type(size, jnp.int32) >> 23
        exponent = jnp.maximum(stored - 127, 1 - self.bias)
        # In units of the last place of its binade a magnitude is a whole number, and
        # the codes of a format count these units from binade to binade.
        units = size * power_of_two(self.mantissa - exponent)
        units = jnp.where(jnp.isnan(x), 0.0, jnp.minimum(jnp.round(units), 2.0**20))
        start = (exponent - (1 - self.bias)) << self.mantissa
        magnitude = jnp.minimum(start + units.astype(jnp.int32), self.top)
        sign = jnp.where((x < 0) & (magnitude > 0), 2 ** (self.bits - 1), 0)
        return (sign | magnitude).astype(jnp.uint8)

    def decode(self, codes: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
        """float32."""
        code = codes.astype(jnp.int32)
        field = (code >> self.mantissa) & (2**self.exponent - 1)
        units = (code & (2**self.mantissa - 1)) + jnp.where(
            field > 0, 2**self.mantissa, 0
        )
        last_place = jnp.maximum(field, 1) - self.bias - self.mantissa
        number = units.astype(jnp.float32) * power_of_two(last_place)
        return jnp.where((code >> (self.bits - 1)) == 1, -number, number)


def power_of_two(exponent: Array) -> Array:
    """2**exponent in float32, exactly, for exponents from -126 to 127."""
    exponent = jnp.clip(exponent, -126, 127)
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
