"""Quantize-pack and unpack-reduce in plain JAX: elementwise code that XLA fuses."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from kernels_pallas.arrays import pad_dim
from kernels_pallas.quantize_pack.format import (
    BLOCK,
    Format,
    magnitude_bits,
    scales_of,
    unit_interval,
)


def pack(
    kind: Format, group: int, x: Float[Array, "R N"], key: Array | None
) -> tuple[UInt8[Array, "B P S N"], Float[Array, "B G N"]]:
    """Codes of `x` in blocks of 256 rows, and a scale for every `group` of them."""
    columns = x.shape[1]
    blocks = -(-x.shape[0] // BLOCK)
    padded = pad_dim(x.astype(jnp.float32), 0, blocks * BLOCK)
    grouped = padded.reshape(blocks, BLOCK // group, group, columns)
    most = lax.bitcast_convert_type(magnitude_bits(grouped).max(axis=2), jnp.float32)
    scales, inverse = scales_of(most, kind.largest)
    random = None if key is None else uniform(key, grouped.shape)
    carried = kind.carry(grouped * inverse[:, :, None], random)
    words = lax.bitcast_convert_type(carried, jnp.uint8).astype(jnp.uint32)
    slabs = words.reshape(blocks, kind.slabs, kind.slab_rows, columns)
    planes = kind.join([slabs[:, i] for i in range(kind.slabs)])
    return jnp.stack(planes, axis=1).astype(jnp.uint8), scales


def reduce(
    kind: Format, packed: UInt8[Array, "n B P S N"], scales: Float[Array, "n B G N"]
) -> Float[Array, "R N"]:
    """The float32 sum over the leading dim of what was packed, all rows of blocks."""
    numbers = unpack(kind, packed, scales)
    return numbers.sum(axis=0).reshape(-1, packed.shape[-1])


def unpack(
    kind: Format, packed: UInt8[Array, "n B P S N"], scales: Float[Array, "n B G N"]
) -> Float[Array, "n B G g N"]:
    """What was packed, in float32 and its groups."""
    parts, blocks, groups, columns = scales.shape
    words = packed.astype(jnp.uint32)
    slabs = kind.split([words[:, :, i] for i in range(kind.planes)])
    carried = lax.bitcast_convert_type(
        jnp.stack(slabs, axis=2).astype(jnp.uint8), kind.carrier
    )
    shape = (parts, blocks, groups, BLOCK // groups, columns)
    numbers = carried.astype(jnp.float32).reshape(shape)
    return numbers * (scales * kind.factor)[:, :, :, None]


def uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "*S"]:
    """Numbers in [0, 1) of 24 bits."""
    return unit_interval(jax.random.bits(key, shape, jnp.uint32))
