"""Quantize-pack and unpack-reduce: signatures, validation and dispatch."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.quantize_pack import reference, tpu, xla
from kernels_pallas.quantize_pack.format import BLOCK, FORMATS, Format
from kernels_pallas.quantize_pack.view import View

NO_GPU = "there is no GPU kernel of it yet; take 'xla'"
GROUPS = (32, 64, 128, 256)
DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


class Packed(NamedTuple):
    """An array on the wire, in B blocks of 256 rows.

    Attributes:
        packed: P planes of bytes that hold the codes of 256 rows and N columns.
        scales: what the numbers of a group of rows of a column are multiplied with.
    """

    packed: UInt8[Array, "*n B P S N"]
    scales: Float[Array, "*n B G N"]


def quantize_pack(
    x: Float[Array, "..."],
    format: str,
    *,
    group: int = 256,
    key: Array | None = None,
    implementation: str | None = None,
) -> Packed:
    """Quantizes an array for a transfer (ZeRO++, Wang et al., 2023: qwZ and qgZ).

    A group of rows of a column shares a scale that maps its largest magnitude to the
    format's largest number. The last dim are the columns and the dims before are the
    rows, padded to whole blocks of 256; where this would add more than an eighth, and
    for fewer than 128 columns, the numbers lie in columns of 128 instead. Small
    arrays should travel together: 32768 numbers are the least. A group with a NaN or
    an infinity arrives as not finite. No gradient.

    Args:
        x: float32, bfloat16 or float16, of any shape that is not empty.
        format: "int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2" or "fp6_e2m3".
        group: rows of a scale: 32, 64, 128 or 256.
        key: rounds stochastically, without bias, with this key, which should differ
            between devices; the bits of implementations differ. None rounds to
            nearest, ties to even.
        implementation: "tpu" (Pallas), "xla" (plain JAX) or "reference" (plain JAX,
            by lookup); None takes "tpu" where the program is compiled for a TPU and
            "xla" elsewhere.

    Raises:
        ValueError: an unknown format, group or implementation, or an empty array.
        TypeError: an unsupported dtype.
    """
    kind = _format(format)
    _check_input(x, group)
    candidates = {
        "tpu": functools.partial(_with_key, tpu.pack, kind, group),
        "gpu": NO_GPU,
        "xla": functools.partial(_with_key, xla.pack, kind, group),
        "reference": functools.partial(_with_key, reference.pack, format, group),
    }
    matrix = View(x.shape).of(x)
    arguments = (matrix,) if key is None else (matrix, key)
    return Packed(
        *dispatch.run("quantize_pack", implementation, candidates, *arguments)
    )


def unpack_reduce(
    packed: UInt8[Array, "n B P S N"],
    scales: Float[Array, "n B G N"],
    format: str,
    *,
    shape: tuple[int, ...] | None = None,
    requantize: str | None = None,
    key: Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."] | Packed:
    """Sums n packed arrays in float32, and can pack the sum again.

    With n = 1 it only unpacks. Whole blocks may have come from different devices.

    Args:
        packed, scales: n results of `quantize_pack`, stacked.
        format: of the parts.
        shape: of the arrays that were packed; None: the result is the matrix
            [256 B, N] with whatever padding it has.
        requantize: a format to pack the sum in, with groups as before, or None.
        key: as in `quantize_pack`, for the packing of the sum.
        implementation: as in `quantize_pack`.

    Returns:
        float32, or `Packed` with `requantize`; the sum itself is then in no memory
        but the chip's own on a TPU.

    Raises:
        ValueError: an unknown format or implementation, shapes that do not fit, or
            `shape` and `requantize` at once.
        TypeError: not uint8 and float32.
    """
    kind = _format(format)
    _check_parts(kind, packed, scales)
    packed, scales = (vary_like(each, packed, scales) for each in (packed, scales))
    if requantize is not None:
        if shape is not None:
            raise ValueError(
                f"shape={shape} and requantize={requantize!r}: a packed sum has no "
                "shape yet; give it to the unpack_reduce that makes it an array"
            )
        kinds = (kind, _format(requantize))
        return _requantize(kinds, packed, scales, key, implementation)
    candidates = {
        "tpu": functools.partial(tpu.reduce, kind),
        "gpu": NO_GPU,
        "xla": functools.partial(xla.reduce, kind),
        "reference": functools.partial(reference.reduce, format),
    }
    run = functools.partial(dispatch.run, "unpack_reduce", implementation, candidates)
    if shape is None:
        return run(packed, scales)
    view = View(tuple(shape))
    if (view.blocks, view.columns) != (packed.shape[1], packed.shape[-1]):
        raise ValueError(
            f"packed {packed.shape} is not of arrays {tuple(shape)}, which have "
            f"B={view.blocks} blocks and N={view.columns} columns"
        )
    return view.back(run(packed, scales))


def _requantize(
    kinds: tuple[Format, Format],
    packed: Array,
    scales: Array,
    key: Array | None,
    implementation: str | None,
) -> Packed:
    group = BLOCK // scales.shape[2]
    names = kinds[0].name, kinds[1].name

    def in_tpu(packed: Array, scales: Array, key: Array | None = None) -> tuple:
        return tpu.reduce_and_pack(kinds, packed, scales, key)

    def in_xla(packed: Array, scales: Array, key: Array | None = None) -> tuple:
        return xla.pack(kinds[1], group, xla.reduce(kinds[0], packed, scales), key)

    def in_words(packed: Array, scales: Array, key: Array | None = None) -> tuple:
        total = reference.reduce(names[0], packed, scales)
        return reference.pack(names[1], group, total, key)

    candidates = {"tpu": in_tpu, "gpu": NO_GPU, "xla": in_xla, "reference": in_words}
    arguments = (packed, scales) if key is None else (packed, scales, key)
    return Packed(
        *dispatch.run("unpack_reduce", implementation, candidates, *arguments)
    )


def _with_key(pack, kind, group: int, x: Array, key: Array | None = None) -> tuple:
    return pack(kind, group, x, key)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format {name!r}; choose one of {list(FORMATS)}")
    return FORMATS[name]


def _check_input(x: Array, group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group={group}; choose one of {GROUPS} rows")
    if x.size < 1:
        raise ValueError(f"x {x.shape} is empty; there is nothing to pack")
    if x.dtype not in DTYPES:
        names = [dtype.name for dtype in DTYPES]
        raise TypeError(f"x is {x.dtype}; give one of {names}")


def _check_parts(kind: Format, packed: Array, scales: Array) -> None:
    if packed.dtype != jnp.uint8 or scales.dtype != jnp.float32:
        raise TypeError(
            f"packed and scales are {packed.dtype} and {scales.dtype}; give uint8 and "
            "float32, as quantize_pack makes them"
        )
    planes = (kind.planes, kind.slab_rows)
    if packed.ndim != 5 or packed.shape[2:4] != planes or min(packed.shape) < 1:
        raise ValueError(
            f"packed {packed.shape} should be [n, B, {planes[0]}, {planes[1]}, N] of "
            f"{kind.name}, n parts of B blocks"
        )
    parts, blocks, _, _, columns = packed.shape
    allowed = [(parts, blocks, BLOCK // group, columns) for group in sorted(GROUPS)]
    if scales.shape not in allowed:
        raise ValueError(
            f"scales {scales.shape} should be [n, B, G, N] for packed {packed.shape}, "
            f"one of {allowed}"
        )
