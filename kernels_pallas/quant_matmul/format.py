"""A storage format of weights: what a code means, how it lies, how it is scaled."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kernels_pallas.quant_matmul.layouts import Native, Slabs
from kernels_pallas.quant_matmul.numbers import Integer, Minifloat
from kernels_pallas.quant_matmul.scaling import ByteScales, FloatScales, PowerScales


@dataclasses.dataclass(frozen=True)
class Format:
    """A weight is `factor * carrier * scale`: `factor * carrier` is its number.

    Attributes:
        name: as in `FORMATS`.
        numbers: between numbers and codes.
        layout: between codes and data, and from data to the carrier.
        scaling: how scales are chosen and stored.
        factor: a power of two, the value of a code over that of its carrier.
    """

    name: str
    numbers: Integer | Minifloat
    layout: Native | Slabs
    scaling: FloatScales | PowerScales | ByteScales = FloatScales()
    factor: float = 1.0

    @property
    def group(self) -> int | None:
        """Rows of a scale if the format fixes them."""
        return self.scaling.group

    @property
    def carrier(self) -> Any:
        """The dtype in which weights enter a dot."""
        return self.layout.carrier

    def pack(self, codes: UInt8[Array, "*L K N"]) -> Array:
        """The data of codes; the -0 of a floating-point format is stored as 0.

        Some matrix units read the byte of -0 as NaN (the "fnuz" formats).
        """
        if isinstance(self.numbers, Minifloat):
            minus_zero = 2 ** (self.numbers.bits - 1)
            codes = jnp.where(codes == minus_zero, 0, codes).astype(jnp.uint8)
        return self.layout.pack(codes)

    def unpack(self, data: Array) -> UInt8[Array, "*L K N"]:
        """The codes of data."""
        return self.layout.unpack(data)

    def values(self, data: Array) -> Float[Array, "*L K N"]:
        """The numbers of data in float32, not scaled."""
        return self.layout.carried(data).astype(jnp.float32) * self.factor
