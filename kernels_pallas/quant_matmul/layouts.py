"""How the codes of a matrix [K, N] lie in memory, and back.

Two layouts. `Native` is an array [K, N] of a dtype that matrix units read. `Slabs`
packs codes of 4 or 6 bits so that a few shifts and masks on 32-bit words make four
codes at a time into bytes of an 8-bit float, the *carrier*: it enters the dot.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt32

BLOCK = 256
"""K is padded to whole blocks of this many rows."""
LANES = 128
"""N is padded to whole blocks of this many columns."""

Words = Sequence[UInt32[Array, "R N"]]


@dataclasses.dataclass(frozen=True)
class Native:
    """Data [..., K, N] of a dtype that devices have.

    Attributes:
        dtype: int8, int4, or an 8-bit float whose bits are the codes.
    """

    dtype: Any
    rank: int = 2

    @property
    def carrier(self) -> Any:
        """What enters the dot."""
        return self.dtype

    def rows(self, shape: tuple[int, ...]) -> int:
        """K of data of this shape."""
        return shape[-2]

    def data_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the data of a matrix."""
        return rows, columns

    def pack(self, codes: UInt8[Array, "*L K N"]) -> Array:
        """The data of these codes."""
        if self.dtype == jnp.int4:
            low = (codes.astype(jnp.int32) << 28) >> 28
            return low.astype(jnp.int4)
        return lax.bitcast_convert_type(codes, self.dtype)

    def unpack(self, data: Array) -> UInt8[Array, "*L K N"]:
        """The codes of this data."""
        if self.dtype == jnp.int4:
            return (data.astype(jnp.int32) & 15).astype(jnp.uint8)
        return lax.bitcast_convert_type(data, jnp.uint8)

    def carried(self, data: Array) -> Array:
        """[..., K, N] of the carrier."""
        return data


@dataclasses.dataclass(frozen=True)
class Slabs:
    """Data uint8 [..., K/256, planes, 256/slabs, N].

    A block of 256 rows is cut into `slabs` of consecutive rows. Byte r of the planes of
    a block holds the codes of row r of every slab, so that four rows' bytes are one
    word, and `split` turns the words of the planes into the words of the slabs: bytes
    of the carrier. Nothing that `split` or `join` keeps crosses a byte, so both work on
    words of four bytes and on bytes one to a word.

    Attributes:
        planes, slabs: how many bytes hold how many codes.
        carrier: the 8-bit float of the slabs' bytes.
        to_byte, from_byte: between a code and its byte of the carrier, on uint8.
        split: words of the planes to words of the slabs.
        join: words of the slabs to words of the planes.
    """

    planes: int
    slabs: int
    carrier: Any
    to_byte: Callable[[Array], Array]
    from_byte: Callable[[Array], Array]
    split: Callable[[Words], Words]
    join: Callable[[Words], Words]
    rank: int = 4
    dtype: Any = jnp.uint8

    @property
    def slab_rows(self) -> int:
        """Rows of a slab."""
        return BLOCK // self.slabs

    def rows(self, shape: tuple[int, ...]) -> int:
        """K of data of this shape."""
        return shape[-4] * BLOCK

    def data_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the data of a matrix."""
        return rows // BLOCK, self.planes, self.slab_rows, columns

    def pack(self, codes: UInt8[Array, "*L K N"]) -> Array:
        """The data of these codes; K is a multiple of 256."""
        *lead, rows, columns = codes.shape
        shape = (*lead, rows // BLOCK, self.slabs, self.slab_rows, columns)
        words = self.to_byte(codes).reshape(shape).astype(jnp.uint32)
        planes = self.join([words[..., i, :, :] for i in range(self.slabs)])
        return jnp.stack(planes, axis=-3).astype(jnp.uint8)

    def unpack(self, data: Array) -> UInt8[Array, "*L K N"]:
        """The codes of this data."""
        return self.from_byte(self._bytes(data))

    def carried(self, data: Array) -> Float[Array, "*L K N"]:
        """[..., K, N] of the carrier."""
        return lax.bitcast_convert_type(self._bytes(data), self.carrier)

    def _bytes(self, data: Array) -> UInt8[Array, "*L K N"]:
        words = data.astype(jnp.uint32)
        slabs = self.split([words[..., i, :, :] for i in range(self.planes)])
        stacked = jnp.stack(slabs, axis=-3).astype(jnp.uint8)
        *lead, blocks, _, _, columns = data.shape
        return stacked.reshape(*lead, blocks * BLOCK, columns)
