"""Scales: one number for the weights of a column, or of a group of rows of a column."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.quant_matmul.numbers import Minifloat

TINY = 2.0**-126
"""The least scale: what is below is flushed to zero on accelerators."""


@dataclasses.dataclass(frozen=True)
class FloatScales:
    """float32 scales, of a whole column or of groups of the caller's size."""

    dtype: Any = jnp.float32
    group: int | None = None
    per_tensor: bool = False

    def choose(
        self, absmax: Float[Array, "*L G N"], largest: float, tensor_scale: Array | None
    ) -> tuple[Array, Float[Array, "*L G N"]]:
        """Stored scales of groups, and their values.

        A group of zeros gets scale 1, one with a NaN or an infinity stays that.

        Args:
            absmax: the largest magnitude of each group.
            largest: the number that it is mapped to.
            tensor_scale: [..., 1, 1] where the format has one.
        """
        scales = absmax / largest
        scales = jnp.where(scales < TINY, 1.0, scales)
        return scales, scales

    def read(self, stored: Array) -> Float[Array, "*L G N"]:
        """The values of stored scales."""
        return stored


@dataclasses.dataclass(frozen=True)
class PowerScales:
    """Powers of two in one byte, e8m0, for 32 rows (OCP Microscaling 1.0, 2023).

    The scale is 2**floor(log2(absmax)) over the power of two in the largest number.
    """

    dtype: Any = jnp.float8_e8m0fnu
    group: int = 32
    per_tensor: bool = False

    def choose(
        self, absmax: Float[Array, "*L G N"], largest: float, tensor_scale: Array | None
    ) -> tuple[Array, Float[Array, "*L G N"]]:
        """As `FloatScales.choose`."""
        exponent = lax.bitcast_convert_type(absmax, jnp.int32) >> 23
        top = int(largest).bit_length() - 1
        byte = jnp.where(absmax == 0, 127, jnp.clip(exponent - top, 1, 254))
        byte = jnp.where(jnp.isfinite(absmax), byte, 255).astype(jnp.uint8)
        stored = lax.bitcast_convert_type(byte, self.dtype)
        return stored, self.read(stored)

    def read(self, stored: Array) -> Float[Array, "*L G N"]:
        """The values of stored scales; byte 255 is NaN."""
        byte = lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.int32)
        power = lax.bitcast_convert_type(byte << 23, jnp.float32)
        return jnp.where(byte == 255, jnp.nan, power)


@dataclasses.dataclass(frozen=True)
class ByteScales:
    """e4m3 scales of 16 rows, times a float32 scale of the tensor (NVFP4, 2025).

    Attributes:
        numbers: e4m3.
    """

    numbers: Minifloat
    dtype: Any = jnp.float8_e4m3fn
    group: int = 16
    per_tensor: bool = True

    def choose(
        self, absmax: Float[Array, "*L G N"], largest: float, tensor_scale: Array | None
    ) -> tuple[Array, Float[Array, "*L G N"]]:
        """As `FloatScales.choose`; the values include the tensor's scale."""
        assert tensor_scale is not None
        codes = self.numbers.encode(absmax / largest / tensor_scale)
        codes = jnp.where(jnp.isfinite(absmax), codes, 127).astype(jnp.uint8)
        stored = lax.bitcast_convert_type(codes, self.dtype)
        scales = self.read(stored) * tensor_scale
        return stored, jnp.where(scales == 0, 1.0, scales)

    def read(self, stored: Array) -> Float[Array, "*L G N"]:
        """The values of stored scales, without the tensor's."""
        return stored.astype(jnp.float32)
