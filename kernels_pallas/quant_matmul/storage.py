"""Files: a `QuantizedTensor` as plain numpy arrays, as safetensors keeps them."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas.quant_matmul import formats
from kernels_pallas.quant_matmul.layouts import BLOCK, LANES
from kernels_pallas.quant_matmul.tensor import QuantizedTensor, check_quantized

ARRAYS = ("data", "scales", "zeros", "tensor_scale")
FIELDS = ("format", "group", "padding", "dtype")


def to_arrays(
    w: QuantizedTensor, prefix: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of uint8 and float32, and the metadata to read them.

    8-bit floats are stored as their bits. INT4 rows 2i and 2i + 1 are one byte, the
    even row in the low half.

    Args:
        w: the weight.
        prefix: `f"{prefix}.data"` and so on are the keys of the arrays.

    Returns:
        arrays, and metadata with one JSON entry of key `prefix`, for
        `safetensors.numpy.save_file(arrays, path, metadata)`.

    Raises:
        TypeError: `w` is no `QuantizedTensor`.
    """
    check_quantized(w)
    arrays = {"data": _to_bytes(np.asarray(w.data))}
    for name in ARRAYS[1:]:
        if getattr(w, name) is not None:
            arrays[name] = _to_bytes(np.asarray(getattr(w, name)))
    values = (w.format_name, w.group, w.padding, jnp.dtype(w.dtype).name)
    entry = json.dumps(dict(zip(FIELDS, values, strict=True)))
    return {f"{prefix}.{name}": x for name, x in arrays.items()}, {prefix: entry}


def from_arrays(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], prefix: str
) -> QuantizedTensor:
    """The weight that `to_arrays` wrote.

    Raises:
        ValueError: an array or its metadata is missing, or they do not fit each other.
    """
    if prefix not in metadata:
        raise ValueError(
            f"no metadata of {prefix!r}; there is that of {list(metadata)}"
        )
    try:
        entry = json.loads(metadata[prefix])
        name, group, padding, dtype = (entry[field] for field in FIELDS)
        padding = (int(padding[0]), int(padding[1]))
        dtype = jnp.dtype(dtype)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"metadata of {prefix!r} is {metadata[prefix]!r}; it should be JSON with "
            f"{list(FIELDS)}"
        ) from error
    kind = formats.get(name)
    found = {each: arrays.get(f"{prefix}.{each}") for each in ARRAYS}
    needed = ["data", "scales"] + ["tensor_scale"] * kind.scaling.per_tensor
    missing = [f"{prefix}.{each}" for each in needed if found[each] is None]
    if missing:
        raise ValueError(f"arrays {missing} of the {name} weight are missing")
    dtypes = (kind.layout.dtype, kind.scaling.dtype, jnp.float32, jnp.float32)
    restored = {
        each: None if x is None else jnp.asarray(_from_bytes(x, stored))
        for (each, x), stored in zip(found.items(), dtypes, strict=True)
    }
    w = QuantizedTensor(
        **restored,  # pyright: ignore
        format_name=name,
        group=group,
        padding=padding,
        dtype=dtype,
    )
    _check_fit(w, prefix)
    return w


def _check_fit(w: QuantizedTensor, prefix: str) -> None:
    """The arrays are those of one weight."""
    layout = w.format.layout
    rows, columns = w.padded if w.data.ndim >= layout.rank else (0, 0)
    data_shape = (*w.lead, *layout.data_shape(rows, columns))
    if not rows or rows % BLOCK or columns % LANES or w.data.shape != data_shape:
        raise ValueError(
            f"{prefix}.data {w.data.shape} is no {w.format_name} data: K should be a "
            f"multiple of {BLOCK} and N of {LANES}"
        )
    expected = (*w.lead, rows // w.rows_per_scale, columns)
    for name, shape in (
        ("scales", expected),
        ("zeros", expected),
        ("tensor_scale", (*w.lead, 1, 1)),
    ):
        x = getattr(w, name)
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{prefix}.{name} {x.shape} should be {shape} for data {w.data.shape} "
                f"in groups of {w.rows_per_scale} rows"
            )


def _to_bytes(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float32 or x.dtype == np.uint8:
        return x
    if x.dtype == ml_dtypes.int4:
        nibbles = x.astype(np.int8).view(np.uint8) & 15
        return nibbles[..., ::2, :] | nibbles[..., 1::2, :] << 4
    return x.view(np.uint8)


def _from_bytes(x: np.ndarray, dtype: Any) -> np.ndarray:
    x, dtype = np.asarray(x), jnp.dtype(dtype)
    if x.dtype != (np.float32 if dtype == np.float32 else np.uint8):
        raise ValueError(f"a stored {dtype} array is {x.dtype}; float32 or uint8")
    if dtype != ml_dtypes.int4:
        return np.ascontiguousarray(x).view(dtype)
    pairs = np.stack([x << 4, x], axis=-2).view(np.int8) >> 4
    *lead, half, _, columns = pairs.shape
    return pairs.reshape(*lead, 2 * half, columns).astype(ml_dtypes.int4)
