"""`QuantizedTensor`: a weight matrix, or a stack of them, in a storage format."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul import formats
from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.layouts import BLOCK, LANES
from kernels_pallas.quant_matmul.numbers import Integer
from kernels_pallas.quant_matmul.scaling import TINY


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scales", "zeros", "tensor_scale"],
    meta_fields=["format_name", "group", "padding", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight [..., K, N] of `number * scale`, or of `(number - zero) * scale`.

    A pytree whose arrays may have leading dims: `lax.scan` and `vmap` take a stack of
    layers apart. K is padded to a multiple of 256 (and of the group), N to one of 128,
    with zeros; the shape is that of the arrays less the padding, so that inside of
    `shard_map` it is the shape of the shard.

    Attributes:
        data: the codes, in the layout of the format.
        scales: [..., G, N], G groups of rows, in the scale dtype of the format.
        zeros: float32 [..., G, N] zero points, in units of codes, or None.
        tensor_scale: float32 [..., 1, 1], a further factor of the scales, or None.
        format_name: key of `formats.FORMATS`.
        group: rows that share a scale; None: all of a column do.
        padding: rows and columns that were added.
        dtype: of the array that was quantized.
    """

    data: Array
    scales: Array
    zeros: Array | None
    tensor_scale: Array | None
    format_name: str
    group: int | None
    padding: tuple[int, int]
    dtype: Any

    @property
    def format(self) -> Format:
        """What the data means."""
        return formats.get(self.format_name)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dims: a stack of matrices."""
        return self.data.shape[: self.data.ndim - self.format.layout.rank]

    @property
    def padded(self) -> tuple[int, int]:
        """K and N as stored."""
        return self.format.layout.rows(self.data.shape), self.data.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N] without padding."""
        rows, columns = self.padded
        return *self.lead, rows - self.padding[0], columns - self.padding[1]

    @property
    def ndim(self) -> int:
        """Dims of the logical array."""
        return len(self.lead) + 2

    @property
    def nbytes(self) -> int:
        """Bytes of all the arrays; two int4 numbers are one byte."""
        return sum(math.ceil(_bits(x) / 8) for x in jax.tree.leaves(self))

    @property
    def rows_per_scale(self) -> int:
        """The group, or all of the stored rows."""
        return self.padded[0] if self.group is None else self.group

    def take(self, layer: Int[Array, ""] | None) -> "QuantizedTensor":
        """Matrix `layer` of a stack; None: the only one."""
        if layer is None:
            return self
        take = functools.partial(
            lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False
        )
        return jax.tree.map(take, self)

    def scale_values(self) -> Float[Array, "*L G N"]:
        """The scales in float32, the tensor's included."""
        scales = self.format.scaling.read(self.scales)
        return scales if self.tensor_scale is None else scales * self.tensor_scale


def quantize(
    w: Float[Array, "*L K N"],
    format: str,
    *,
    group: int | None = None,
    symmetric: bool = True,
) -> QuantizedTensor:
    """Weights to the nearest codes, ties to even, the largest of a group exactly.

    Every matrix of the leading dims is quantized for itself. Under `jit` a NaN or an
    infinity cannot be refused: its group becomes NaN.

    Args:
        w: a weight, or a stack of them; it is multiplied from the left, `x @ w`.
        format: one of `formats.FORMATS`.
        group: rows of K that share a scale, 128 or a multiple of 256; None: one scale
            for a column. The fp4 formats have their own.
        symmetric: False gives integers a zero point, and the whole range of codes.

    Raises:
        ValueError: no such format, a group that it does not have, a zero point without
            integers, fewer than two dims, empty dims, or numbers that are not finite.
        TypeError: `w` is not floating point.
    """
    kind = formats.get(format)
    _check_weight(w)
    _check_group(kind, group, symmetric)
    _refuse_not_finite(w)
    group = group if kind.group is None else kind.group
    return _quantize(w, format, group, symmetric)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(
    w: Array, format: str, group: int | None, symmetric: bool
) -> QuantizedTensor:
    kind = formats.get(format)
    *lead, rows, columns = w.shape
    padding = padding_of(rows, columns, group)
    widths = [(0, 0)] * len(lead) + [(0, each) for each in padding]
    padded = jnp.pad(w.astype(jnp.float32), widths)
    grouped = padded.reshape(*lead, -1, group or padded.shape[-2], padded.shape[-1])
    tensor_scale, zeros = None, None
    if symmetric:
        largest = kind.numbers.largest
        absmax = jnp.abs(_nan_as_infinity(grouped)).max(axis=-2)
        if kind.scaling.per_tensor:
            tensor_scale = _tensor_scale(kind, absmax)
        scales, values = kind.scaling.choose(absmax, largest, tensor_scale)
        numbers = grouped / values[..., None, :]
    else:
        scales, values, zeros = _affine(kind, grouped)
        numbers = jnp.round(grouped / values[..., None, :]) + zeros[..., None, :]
    codes = kind.numbers.encode(numbers.reshape(padded.shape))
    data = kind.pack(codes)
    return QuantizedTensor(
        data, scales, zeros, tensor_scale, format, group, padding, jnp.dtype(w.dtype)
    )


def _tensor_scale(kind: Format, absmax: Array) -> Array:
    """[..., 1, 1]: what maps the largest step of the tensor to the largest scale."""
    largest = kind.numbers.largest * kind.scaling.numbers.largest  # pyright: ignore
    scale = absmax.max(axis=(-2, -1), keepdims=True) / largest
    return jnp.where(scale < TINY, 1.0, scale)


def _affine(kind: Format, grouped: Array) -> tuple[Array, Array, Array]:
    """Scales, twice, and zero points that map each group's range to all codes."""
    assert isinstance(kind.numbers, Integer)
    grouped = _nan_as_infinity(grouped)
    low = jnp.minimum(grouped.min(axis=-2), 0.0)
    high = jnp.maximum(grouped.max(axis=-2), 0.0)
    least, steps = kind.numbers.smallest, 2.0**kind.numbers.bits - 1
    scales, values = kind.scaling.choose(high - low, steps, None)
    return scales, values, least - jnp.round(low / values)


def _nan_as_infinity(x: Array) -> Array:
    """`x` for reductions: on some backends a maximum leaves NaN out."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def dequantize(q: QuantizedTensor, dtype: Any = None) -> Float[Array, "*L K N"]:
    """The weights, computed in float32; by default in the dtype they had.

    Raises:
        TypeError: `q` is no `QuantizedTensor`.
    """
    check_quantized(q)
    return _dequantize(q, jnp.dtype(q.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(q: QuantizedTensor, dtype: Any) -> Array:
    rows, columns = q.shape[-2:]
    return padded_values(q)[..., :rows, :columns].astype(dtype)


def padded_values(q: QuantizedTensor) -> Float[Array, "*L K N"]:
    """The weights in float32, as stored, with the padding."""
    values = q.format.values(q.data)
    grouped = values.reshape(*q.lead, -1, q.rows_per_scale, q.padded[1])
    if q.zeros is not None:
        grouped = grouped - q.zeros[..., None, :]
    return (grouped * q.scale_values()[..., None, :]).reshape(values.shape)


def check_quantized(w: Any) -> None:
    """Raises TypeError for what is no weight in the order of files and TPUs."""
    if not isinstance(w, QuantizedTensor):
        raise TypeError(
            f"the weight is {type(w).__name__}; give a `QuantizedTensor`, which "
            "`quantize` returns, and `arrange_from_gpu` for a `GpuTensor`"
        )


def padding_of(rows: int, columns: int, group: int | None) -> tuple[int, int]:
    """Rows and columns to add to a matrix."""
    return -rows % math.lcm(BLOCK, group or 1), -columns % LANES


def _bits(x: Any) -> int:
    small = {jnp.dtype(jnp.int4): 4}
    return x.size * small.get(jnp.dtype(x.dtype), 8 * jnp.dtype(x.dtype).itemsize)


def _check_weight(w: Array) -> None:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"weights are {w.dtype}; give a floating-point array")
    if w.ndim < 2 or min(w.shape[-2:]) < 1:
        raise ValueError(
            f"weights {w.shape} should be [..., K, N] with K and N of at least 1"
        )


def _check_group(kind: Format, group: int | None, symmetric: bool) -> None:
    fixed = kind.group
    if fixed is not None and group not in (None, fixed):
        raise ValueError(
            f"group={group}; {kind.name} has scales of {fixed} rows, leave it None"
        )
    if fixed is None and group not in (None, 128) and (group < 1 or group % BLOCK):
        raise ValueError(
            f"group={group}; give 128, a multiple of {BLOCK}, or None for one scale "
            "for a whole column"
        )
    if not symmetric and not isinstance(kind.numbers, Integer):
        raise ValueError(
            f"symmetric=False for {kind.name}; only int8 and int4 have zero points"
        )


def _refuse_not_finite(w: Array) -> None:
    """Nothing under `jit`, where the numbers are not known."""
    if isinstance(w, Tracer):
        return
    finite = np.asarray(jnp.isfinite(w))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{finite.size - finite.sum()} of the weights {w.shape} are not finite, "
            f"the first at {first} is {w[first]}; formats have no code for them"
        )
