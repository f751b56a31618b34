"""FP4 weights e2m1: MXFP4 (OCP Microscaling 1.0, 2023) and NVFP4 (NVIDIA, 2025).

A code `s eem` as the byte `s000eem0` is, as e5m2, the number times 2**-14. Slab 0 is
these bytes; slab 1 has its three low bits in bits 6 to 4 and its sign in bit 0.
"""

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.fp8 import E4M3
from kernels_pallas.quant_matmul.layouts import Slabs, Words
from kernels_pallas.quant_matmul.numbers import Minifloat
from kernels_pallas.quant_matmul.scaling import ByteScales, PowerScales

E2M1 = Minifloat(exponent=2, mantissa=1, bias=1, top=7)

_SIGN, _REST = 0x80808080, 0x0E0E0E0E


def split(planes: Words) -> Words:
    """Words of one plane to words of two slabs."""
    (plane,) = planes
    sign = (plane << jnp.uint32(7)) & jnp.uint32(_SIGN)
    rest = (plane >> jnp.uint32(3)) & jnp.uint32(_REST)
    return [plane & jnp.uint32(_SIGN | _REST), sign | rest]


def join(slabs: Words) -> Words:
    """The inverse of `split`."""
    first, second = slabs
    sign = (second & jnp.uint32(_SIGN)) >> jnp.uint32(7)
    rest = (second & jnp.uint32(_REST)) << jnp.uint32(3)
    return [first | sign | rest]


def _to_byte(codes: Array) -> Array:
    return ((codes & 8) << 4) | ((codes & 7) << 1)


def _from_byte(byte: Array) -> Array:
    return ((byte & 0x80) >> 4) | ((byte & 0x0E) >> 1)


_LAYOUT = Slabs(1, 2, jnp.dtype(jnp.float8_e5m2), _to_byte, _from_byte, split, join)

MXFP4 = Format("mxfp4", E2M1, _LAYOUT, PowerScales(), factor=2.0**14)
NVFP4 = Format("nvfp4", E2M1, _LAYOUT, ByteScales(E4M3), factor=2.0**14)
