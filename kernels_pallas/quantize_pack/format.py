"""The wire formats: numbers, and how the bytes of 256 rows become fewer bytes.

Every number travels as the byte of a *carrier*, a type that devices convert from and to
float32: `number = factor * carrier`. Formats of less than 8 bits leave bits of that
byte at zero, and `join` puts the codes of other rows there. A block of 256 rows is cut
into slabs of consecutive rows; byte r of the planes of a block holds row r of every
slab. Nothing crosses a byte, so the same code works on words of four rows' bytes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from kernels_pallas.quant_matmul import fp6

BLOCK = 256
"""Rows that are packed together."""
TINY = 2.0**-126
"""The least scale: what is below is flushed to zero on accelerators."""

Words = Sequence[UInt32[Array, "R N"]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One wire format.

    Attributes:
        name: as in `FORMATS`.
        largest: the number that the largest magnitude of a group becomes.
        mantissa: bits of a floating-point format; None for integers.
        least_exponent: of its normal numbers; below, the steps stay the same.
        carrier, factor: see the module.
        planes, slabs: how many bytes hold how many codes.
        split: words of the planes to words of the slabs' carriers.
        join: the inverse.
    """

    name: str
    largest: float
    mantissa: int | None
    least_exponent: int
    carrier: Any
    factor: float
    planes: int
    slabs: int
    split: Callable[[Words], Words]
    join: Callable[[Words], Words]

    @property
    def slab_rows(self) -> int:
        """Rows of a slab."""
        return BLOCK // self.slabs

    def carry(
        self, numbers: Float[Array, "*S"], random: Float[Array, "*S"] | None
    ) -> Array:
        """Numbers as carriers, rounded to those of the format.

        Rounded in float32, exactly and as everywhere: a conversion to 8 bits that
        still has something to round may do it twice.

        Args:
            numbers: float32, about `largest` at most.
            random: uniform in [0, 1): a number goes to either of its neighbours, to
                the nearer one as often as it is nearer. None: to nearest, ties to even.
        """
        step, inverse = self._steps(numbers)
        units = numbers if inverse is None else numbers * inverse
        whole = jnp.round(units) if random is None else jnp.floor(units + random)
        snapped = whole if step is None else whole * step
        snapped = jnp.clip(snapped, -self.largest, self.largest)
        return (snapped * (1 / self.factor)).astype(self.carrier)

    def _steps(self, numbers: Array) -> tuple[Array | None, Array | None]:
        """The distance of neighbours in the binade of each number, and one over it."""
        if self.mantissa is None:
            return None, None
        binade = lax.bitcast_convert_type(numbers, jnp.int32) & 0x7F800000
        step = jnp.maximum(binade, (127 + self.least_exponent) << 23)
        step = step - (self.mantissa << 23)
        inverse = (254 << 23) - step
        as_float = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
        return as_float(step), as_float(inverse)


def scales_of(
    magnitude: Float[Array, "*S"], largest: float
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Scale of a group with this largest magnitude, and one over it.

    A group of zeros has scale 1; one with a NaN or an infinity has that as its scale,
    and is not finite on the other side either.
    """
    scale = magnitude / largest
    scale = jnp.where(scale < TINY, 1.0, scale)
    return scale, 1 / scale


def magnitude_bits(x: Float[Array, "*S"]) -> Array:
    """int32 in the order of magnitudes, NaN the highest: floats may lose a NaN."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def unit_interval(bits: UInt32[Array, "*S"]) -> Float[Array, "*S"]:
    """Uniform numbers in [0, 1) from random bits, of which 24 count."""
    return (bits >> jnp.uint32(8)).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def _same(words: Words) -> Words:
    return words


def _split_nibbles(planes: Words) -> Words:
    """An integer in the upper half of a byte is 16 times itself, with its sign."""
    (plane,) = planes
    upper = jnp.uint32(0xF0F0F0F0)
    return [(plane << jnp.uint32(4)) & upper, plane & upper]


def _join_nibbles(slabs: Words) -> Words:
    low, high = slabs
    return [high | ((low >> jnp.uint32(4)) & jnp.uint32(0x0F0F0F0F))]


def _whole(
    name: str, largest: float, mantissa: int | None, least: int, carrier: Any
) -> Format:
    return Format(name, largest, mantissa, least, carrier, 1.0, 1, 1, _same, _same)


def _six(name: str, largest: float, mantissa: int, least: int, carrier: Any) -> Format:
    factor = {jnp.float8_e5m2: 2.0**12, jnp.float8_e4m3fn: 2.0**6}[carrier]
    return Format(
        name, largest, mantissa, least, carrier, factor, 3, 4, fp6.split, fp6.join
    )


INT4 = Format(
    "int4", 7.0, None, 0, jnp.int8, 1 / 16, 1, 2, _split_nibbles, _join_nibbles
)
FORMATS = {
    each.name: each
    for each in (
        _whole("int8", 127.0, None, 0, jnp.int8),
        INT4,
        _whole("fp8_e4m3", 448.0, 3, -6, jnp.float8_e4m3fn),
        _whole("fp8_e5m2", 57344.0, 2, -14, jnp.float8_e5m2),
        _six("fp6_e3m2", 28.0, 2, -2, jnp.float8_e5m2),
        _six("fp6_e2m3", 7.5, 3, 0, jnp.float8_e4m3fn),
    )
}
"""By name: integers, and floating point with so many exponent and mantissa bits."""
