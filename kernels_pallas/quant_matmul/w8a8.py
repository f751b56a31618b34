"""Products of 8-bit activations with quantized weights: W8A8, W6A8, W4A8, W4A4.

Activations are quantized per token as the product needs them (ZeroQuant, Yao et al.,
2022). INT8 codes meet INT8 and INT4 weights, and products are summed as integers; e4m3
codes meet FP8 and FP6 weights. Scales of tokens and of weights follow the sum.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.devices import hopper_candidate
from kernels_pallas.quant_matmul import api, gpu, tpu, xla
from kernels_pallas.quant_matmul.activations import KINDS, Rows, kind_for, quantize_rows
from kernels_pallas.quant_matmul.gpu_tensor import GpuTensor
from kernels_pallas.quant_matmul.numbers import Integer
from kernels_pallas.quant_matmul.tensor import QuantizedTensor, padded_values

NAME = "w8a8_matmul"


def w8a8_matmul(
    x: Float[Array, "*B M K"],
    w: QuantizedTensor | GpuTensor,
    out_dtype: Any = None,
    activations: str | None = None,
    implementation: str | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "*B M N"]:
    """`quantized(x) @ dequantize(w)`, with 8-bit (or 4-bit) numbers on both sides.

    Works where `quant_matmul` does. The gradient flows to `x` as if it had not been
    quantized (straight through); `w` is a constant.

    Args:
        x: activations, float32, bfloat16 or float16; any leading dims, or none.
        w: one matrix, or a stack of them with `layer`, of a format with scales of at
            least 128 rows; for Hopper GPUs as in `quant_matmul`.
        out_dtype: of the result, one of the same; that of `x` by default.
        activations: "int8" or "int4" with integer weights, "fp8_e4m3" with the others;
            None: 8 bits.
        implementation, layer: as in `quant_matmul`.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, activations that
            do not go with the weights.
        TypeError: `w` is no `QuantizedTensor` or `GpuTensor`, or an unsupported dtype.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    api.check(x, w, layer, out_dtype)
    dispatch.check(
        NAME,
        implementation,
        IMPLEMENTATIONS | {"gpu": gpu.reason(w) or gpu.matmul_rows},
    )
    kind = _kind(w, activations)
    rows, columns = w.shape[-2:]
    out_shape = (*x.shape[:-1], columns)
    x = x.reshape(math.prod(x.shape[:-1]), rows)
    if x.size == 0:
        return jnp.zeros(out_shape, out_dtype)
    leaves = jax.tree.leaves(w)
    w = jax.tree.map(lambda each: vary_like(each, x, *leaves), w)
    layer = api.layer_index(layer, x, *leaves)
    out = _multiply(implementation, kind, out_dtype, vary_like(x, *leaves), w, layer)
    return out.reshape(out_shape)


def reference_matmul(
    x: Rows, w: QuantizedTensor, layer: Array | None, out_dtype: Any
) -> Float[Array, "M N"]:
    """The meaning, in float32."""
    w = w.take(layer)
    product = jnp.dot(
        x.values(jnp.float32), padded_values(w), precision=lax.Precision.HIGHEST
    )
    return x.scaled(product)[:, : w.shape[1]].astype(out_dtype)


def xla_matmul(
    x: Rows, w: QuantizedTensor, layer: Array | None, out_dtype: Any
) -> Float[Array, "M N"]:
    """For any backend: integers where scales are of columns, else 16 bits."""
    w = w.take(layer)
    if w.group is None and w.zeros is None and x.codes.dtype == jnp.int8:
        sums = lax.dot_general(
            x.codes,
            w.data.astype(jnp.int8),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        product = (sums.astype(jnp.float32) * w.scales)[:, : w.shape[1]]
    else:
        codes = x.values(jnp.bfloat16)[:, : w.shape[0]]
        product = xla.matmul(codes, w, None, jnp.float32)
    return x.scaled(product).astype(out_dtype)


IMPLEMENTATIONS = {
    "tpu": tpu.matmul_rows,
    "xla": xla_matmul,
    "reference": reference_matmul,
}


def _product(
    implementation: str | None,
    kind: str,
    out_dtype: Any,
    x: Array,
    w: api.Weights,
    layer: Array | None,
) -> Array:
    candidates: dict[str, Any] = {
        name: functools.partial(api.in_order, each, out_dtype)
        for name, each in IMPLEMENTATIONS.items()
    }
    own = functools.partial(gpu.matmul_rows, out_dtype=out_dtype)
    candidates["gpu"] = hopper_candidate(implementation, x, gpu.reason(w), own)
    rows = quantize_rows(pad_dim(x, 1, w.padded[0]), kind)
    return dispatch.run(NAME, implementation, candidates, rows, w, layer)


def _forward(
    implementation: str | None,
    kind: str,
    out_dtype: Any,
    x: Array,
    w: api.Weights,
    layer: Array | None,
) -> tuple[Array, api.Residuals]:
    out = _product(implementation, kind, out_dtype, x, w, layer)
    return out, (x[:0], w, layer)


def _backward(
    implementation: str | None,
    kind: str,
    out_dtype: Any,
    residuals: api.Residuals,
    g: Array,
) -> tuple[Array, None, None]:
    return api.backward(implementation, out_dtype, residuals, g)


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0, 1, 2))
_multiply.defvjp(_forward, _backward)


def _kind(w: api.Weights, activations: str | None) -> str:
    kind = kind_for(w.format) if activations is None else activations
    integers = isinstance(w.format.numbers, Integer)
    fitting = [
        name
        for name, numbers in KINDS.items()
        if isinstance(numbers, Integer) == integers
    ]
    if kind not in fitting:
        raise ValueError(
            f"activations={activations!r} with {w.format_name} weights; give one of "
            f"{fitting}, or None"
        )
    if w.format.group is not None:
        raise ValueError(
            f"{w.format_name} has scales of {w.format.group} rows, too few for sums of "
            "8-bit products; use `quant_matmul`, or another format"
        )
    return kind
