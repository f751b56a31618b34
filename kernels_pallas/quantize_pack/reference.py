"""The meaning of the wire formats, from the list of a format's numbers.

Slow and without any trick: every number is looked up among all of the format's, and
every bit is put where the docstring of `format` and `BITS` say.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from kernels_pallas.arrays import pad_dim
from kernels_pallas.quantize_pack.format import BLOCK, TINY
from kernels_pallas.quantize_pack.xla import uniform

BITS = {
    "int8": ([(0, i, i) for i in range(8)],),
    "fp8_e4m3": ([(0, i, i) for i in range(8)],),
    "fp8_e5m2": ([(0, i, i) for i in range(8)],),
    "int4": ([(0, i, i) for i in range(4)], [(0, i, i + 4) for i in range(4)]),
}
"""For each slab: (plane, bit of the code, bit of the plane's byte) of every bit."""
_SIX = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 7)]
BITS["fp6_e3m2"] = BITS["fp6_e2m3"] = (
    *([(plane, code, byte) for code, byte in _SIX] for plane in range(3)),
    [(0, 3, 5), (0, 4, 6), (1, 1, 5), (1, 2, 6), (2, 0, 5), (2, 5, 6)],
)
_TYPES = {
    "int8": np.int8,
    "int4": ml_dtypes.int4,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
}


def numbers_of(format: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite numbers of a format from the lowest, float32, and their codes.

    Integers without the one that has no negative; of the two zeros the positive one.
    """
    codes = np.arange(2 ** _bits(format), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        numbers = codes.view(_TYPES[format]).astype(np.float32)
    if format == "int4":
        numbers = ((codes.astype(np.int8) ^ 8) - 8).astype(np.float32)
    finite = np.isfinite(numbers) & ((numbers != 0) | (codes == 0))
    if format.startswith("int"):
        finite &= numbers > numbers.min()
    order = np.argsort(numbers[finite])
    return numbers[finite][order], codes[finite][order]


def pack(
    format: str, group: int, x: Float[Array, "R N"], key: Array | None
) -> tuple[UInt8[Array, "B P S N"], Float[Array, "B G N"]]:
    """As `xla.pack`; NaN has no code, and an infinity none either."""
    numbers, codes = (jnp.asarray(each) for each in numbers_of(format))
    columns, blocks = x.shape[1], -(-x.shape[0] // BLOCK)
    padded = pad_dim(x.astype(jnp.float32), 0, blocks * BLOCK)
    grouped = padded.reshape(blocks, BLOCK // group, group, columns)
    scales = jnp.abs(grouped).max(axis=2) / numbers[-1]
    scales = jnp.where(scales < TINY, 1.0, scales)
    value = grouped * (1 / scales)[:, :, None]
    value = jnp.clip(value, numbers[0], numbers[-1])
    above = jnp.clip(jnp.searchsorted(numbers, value, side="right"), 1, len(codes) - 1)
    low, high = numbers[above - 1], numbers[above]
    part = (value - low) / (high - low)
    if key is None:
        even = codes[above] % 2 == 0
        up = (part > 0.5) | ((part == 0.5) & even)
    else:
        up = part + uniform(key, part.shape) >= 1
    chosen = codes[above - 1 + up.astype(above.dtype)]
    if key is None and not format.startswith("int"):
        # What is rounded to zero keeps its sign.
        sign = jnp.uint8(2 ** (_bits(format) - 1))
        chosen = jnp.where((chosen == 0) & jnp.signbit(value), sign, chosen)
    return _place(format, chosen.reshape(blocks, BLOCK, columns)), scales


def reduce(
    format: str, packed: UInt8[Array, "n B P S N"], scales: Float[Array, "n B G N"]
) -> Float[Array, "R N"]:
    """As `xla.reduce`."""
    numbers, codes = numbers_of(format)
    table = np.zeros(256, np.float32)
    table[codes] = numbers
    parts, blocks, groups, columns = scales.shape
    values = jnp.asarray(table)[_codes(format, packed).astype(jnp.int32)]
    values = values.reshape(parts, blocks, groups, BLOCK // groups, columns)
    total = (values * scales[:, :, :, None]).sum(axis=0)
    return total.reshape(blocks * BLOCK, columns)


def _place(format: str, codes: UInt8[Array, "B R N"]) -> UInt8[Array, "B P S N"]:
    slabs = BITS[format]
    blocks, rows, columns = codes.shape
    cut = codes.reshape(blocks, len(slabs), rows // len(slabs), columns)
    planes = [jnp.zeros_like(cut[:, 0]) for _ in range(_planes(format))]
    for i, slab in enumerate(slabs):
        for plane, code_bit, byte_bit in slab:
            bit = (cut[:, i] >> code_bit) & 1
            planes[plane] = planes[plane] | (bit << byte_bit)
    return jnp.stack(planes, axis=1)


def _codes(format: str, packed: UInt8[Array, "n B P S N"]) -> UInt8[Array, "n B R N"]:
    slabs = []
    for slab in BITS[format]:
        codes = jnp.zeros_like(packed[:, :, 0])
        for plane, code_bit, byte_bit in slab:
            bit = (packed[:, :, plane] >> byte_bit) & 1
            codes = codes | (bit << code_bit)
        slabs.append(codes)
    return jnp.concatenate(slabs, axis=2)


def _bits(format: str) -> int:
    return len(BITS[format][0])


def _planes(format: str) -> int:
    return 1 + max(plane for slab in BITS[format] for plane, _, _ in slab)
