"""FP6 weights, e3m2 and e2m3 (FP6-LLM, Xia et al., 2024), exactly 6 bits each.

A code `s eeemm` or `s eemmm` is kept as the byte `s00xxxxx`, which as e5m2 is the e3m2
number times 2**-12, and as e4m3 the e2m3 number times 2**-6: subnormals line up too.
Slabs 0, 1 and 2 of a block are these bytes; bits 6 and 5 of the three, always zero,
hold the six bits of slab 3: 14 operations on words decode 16 weights.
"""

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.layouts import Slabs, Words
from kernels_pallas.quant_matmul.numbers import Minifloat

E3M2 = Minifloat(exponent=3, mantissa=2, bias=3, top=0x1F)
E2M3 = Minifloat(exponent=2, mantissa=3, bias=1, top=0x1F)

_KEPT = 0x9F9F9F9F
# Bits of a slab 3 byte that each plane holds: (of the byte, shift to the left).
_PARTS = (((0x18181818, 2),), ((0x06060606, 4),), ((0x80808080, -1), (0x01010101, 5)))


def split(planes: Words) -> Words:
    """Words of three planes to words of four slabs."""
    rest = jnp.uint32(0)
    for plane, parts in zip(planes, _PARTS, strict=True):
        for mask, left in parts:
            rest = rest | (_shift(plane, -left) & jnp.uint32(mask))
    return [*(plane & jnp.uint32(_KEPT) for plane in planes), rest]


def join(slabs: Words) -> Words:
    """The inverse of `split`."""
    *whole, rest = slabs
    planes = []
    for plane, parts in zip(whole, _PARTS, strict=True):
        for mask, left in parts:
            plane = plane | _shift(rest & jnp.uint32(mask), left)
        planes.append(plane)
    return planes


def _shift(words: Array, left: int) -> Array:
    """`words` shifted by `left` bits, to the right if negative."""
    return words << jnp.uint32(left) if left > 0 else words >> jnp.uint32(-left)


def _to_byte(codes: Array) -> Array:
    return ((codes & 0x20) << 2) | (codes & 0x1F)


def _from_byte(byte: Array) -> Array:
    return ((byte & 0x80) >> 2) | (byte & 0x1F)


def _layout(carrier: type) -> Slabs:
    return Slabs(3, 4, jnp.dtype(carrier), _to_byte, _from_byte, split, join)


FP6_E3M2 = Format("fp6_e3m2", E3M2, _layout(jnp.float8_e5m2), factor=2.0**12)
FP6_E2M3 = Format("fp6_e2m3", E2M3, _layout(jnp.float8_e4m3fn), factor=2.0**6)
