"""The two planes of ZeroQuant(4+2) (Wu et al., 2023): FP6 e3m2 as 4 bits and 2 bits.

A code `s eee mm` is cut behind its exponent. The plane of four bits, `s eee`, has rows
2i and 2i + 1 of K in one byte, the even row in the low half: uint8 [..., K/2, N]. The
plane of two bits, `mm`, has rows 4i to 4i + 3 in one byte, row 4i + j in bits 2j and
2j + 1: uint8 [..., K/4, N]. Scales are one per column, float32 [..., N]: a weight is
its e3m2 number times its column's scale. K is not padded and divides by 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kernels_pallas.quant_matmul.fp6 import FP6_E3M2
from kernels_pallas.quant_matmul.tensor import (
    QuantizedTensor,
    check_quantized,
    padding_of,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoPlanes:
    """The arrays of the module's docstring."""

    four: UInt8[Array, "*L K2 N"]
    two: UInt8[Array, "*L K4 N"]
    scales: Float[Array, "*L N"]


def to_two_planes(w: QuantizedTensor) -> TwoPlanes:
    """The planes of an FP6 e3m2 weight.

    Raises:
        ValueError: another format, scales of groups, or K does not divide by 4.
        TypeError: `w` is no `QuantizedTensor`.
    """
    check_quantized(w)
    rows, columns = w.shape[-2:]
    if w.format_name != FP6_E3M2.name or w.group is not None:
        raise ValueError(
            f"{w.format_name} with group={w.group} has no two planes; give "
            f"{FP6_E3M2.name} with one scale for a column"
        )
    if rows % 4:
        raise ValueError(f"K={rows}; four rows share a byte, give a multiple of 4")
    codes = FP6_E3M2.unpack(w.data)[..., :rows, :columns]
    high, low = codes >> 2, codes & 3
    four = high[..., ::2, :] | (high[..., 1::2, :] << 4)
    parts = [low[..., j::4, :] << (2 * j) for j in range(4)]
    two = parts[0] | parts[1] | parts[2] | parts[3]
    return TwoPlanes(four, two, w.scales[..., 0, :columns])


def from_two_planes(planes: TwoPlanes, dtype: Any = jnp.bfloat16) -> QuantizedTensor:
    """The FP6 e3m2 weight of these planes.

    Args:
        planes: numpy or jax arrays.
        dtype: that of the weight before it was quantized.

    Raises:
        ValueError: the shapes do not fit each other, or the planes are not uint8.
    """
    four, two = jnp.asarray(planes.four), jnp.asarray(planes.two)
    scales = jnp.asarray(planes.scales)
    if four.dtype != jnp.uint8 or two.dtype != jnp.uint8 or four.ndim < 2:
        raise ValueError(
            f"planes are {four.dtype} {four.shape} and {two.dtype} {two.shape}; they "
            "should be uint8 [..., K/2, N] and [..., K/4, N]"
        )
    *lead, half, columns = four.shape
    if half % 2 or two.shape != (*lead, half // 2, columns):
        raise ValueError(
            f"planes {four.shape} and {two.shape} should be [..., K/2, N] and "
            "[..., K/4, N] of the same K, a multiple of 4"
        )
    if scales.shape != (*lead, columns):
        raise ValueError(f"scales {scales.shape} should be {(*lead, columns)}")
    high = jnp.stack([four & 15, four >> 4], axis=-2)
    low = jnp.stack([(two >> (2 * j)) & 3 for j in range(4)], axis=-2)
    shape = (*lead, 2 * half, columns)
    codes = (high.reshape(shape) << 2) | low.reshape(shape)
    padding = padding_of(2 * half, columns, None)
    widths = [(0, 0)] * len(lead)
    codes = jnp.pad(codes, [*widths, *((0, each) for each in padding)])
    scales = jnp.pad(
        scales.astype(jnp.float32), [*widths, (0, padding[1])], constant_values=1.0
    )
    data = FP6_E3M2.pack(codes)
    return QuantizedTensor(
        data,
        scales[..., None, :],
        None,
        None,
        FP6_E3M2.name,
        None,
        padding,
        jnp.dtype(dtype),
    )
