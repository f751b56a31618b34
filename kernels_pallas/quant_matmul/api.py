"""Products with quantized weights: signature, checks, gradient, dispatch."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.devices import hopper_candidate
from kernels_pallas.quant_matmul import gpu, reference, tpu, xla
from kernels_pallas.quant_matmul.gpu_tensor import GpuTensor, as_quantized
from kernels_pallas.quant_matmul.tensor import QuantizedTensor, dequantize

NAME = "quant_matmul"
IMPLEMENTATIONS = {
    "tpu": tpu.matmul,
    "xla": xla.matmul,
    "reference": reference.matmul,
}
"""For weights in the order of every device but a GPU."""

Weights = QuantizedTensor | GpuTensor
Residuals = tuple[Array, Weights, Array | None]
DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def quant_matmul(
    x: Float[Array, "*B M K"],
    w: QuantizedTensor | GpuTensor,
    out_dtype: Any = None,
    implementation: str | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "*B M N"]:
    """`x @ dequantize(w)` without writing the weights out.

    Sums are float32 and no weight is rounded: the error is that of the sum and of the
    last rounding to `out_dtype`. Works under `jit`, `grad`, `vmap`, `scan`, and inside
    of `shard_map` on shards (`partition_specs`; where K is split, sum the results over
    its axis). The gradient flows to `x` alone; `w` is a constant.

    Args:
        x: activations, float32, bfloat16 or float16; any leading dims, or none.
        w: one matrix, or a stack of them with `layer`; for Hopper GPUs, what
            `arrange_for_gpu` makes of it, which others put in order again every time.
        out_dtype: of the result, one of the same; that of `x` by default.
        implementation: "tpu" (Pallas), "gpu" (Pallas, Hopper GPUs, a `GpuTensor`),
            "xla" (plain JAX) or "reference" (plain JAX, in float32); None takes "tpu"
            where the program is compiled for a TPU, "gpu" where it is known to be for a
            Hopper GPU (`devices.device_kind`) and `w` is arranged for it, and "xla"
            elsewhere.
        layer: int32, which matrix of a stack [L, K, N]. In a `scan` over layers, scan
            over this number: the TPU kernel reads the matrix where it lies, while what
            `scan` cuts out of the stack is copied first.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that
            cannot run and why.
        TypeError: `w` is no `QuantizedTensor` or `GpuTensor`, or an unsupported dtype.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    check(x, w, layer, out_dtype)
    dispatch.check(
        NAME, implementation, IMPLEMENTATIONS | {"gpu": gpu.reason(w) or gpu.matmul}
    )
    rows, columns = w.shape[-2:]
    out_shape = (*x.shape[:-1], columns)
    x = x.reshape(math.prod(x.shape[:-1]), rows)
    if x.size == 0:
        return jnp.zeros(out_shape, out_dtype)
    leaves = jax.tree.leaves(w)
    w = jax.tree.map(lambda each: vary_like(each, x, *leaves), w)
    layer = layer_index(layer, x, *leaves)
    out = _multiply(implementation, out_dtype, vary_like(x, *leaves), w, layer)
    return out.reshape(out_shape)


def layer_index(
    layer: Int[Array, ""] | int | None, *others: Array
) -> Int[Array, ""] | None:
    """As an array that varies as `others` do."""
    if layer is None:
        return None
    return vary_like(jnp.asarray(layer, jnp.int32), *others)


def _product(
    implementation: str | None,
    out_dtype: Any,
    x: Array,
    w: Weights,
    layer: Array | None,
) -> Array:
    candidates: dict[str, Any] = {
        name: functools.partial(in_order, each, out_dtype)
        for name, each in IMPLEMENTATIONS.items()
    }
    own = functools.partial(gpu.matmul, out_dtype=out_dtype)
    candidates["gpu"] = hopper_candidate(implementation, x, gpu.reason(w), own)
    return dispatch.run(NAME, implementation, candidates, x, w, layer)


def in_order(
    function: Callable[..., Array], out_dtype: Any, x: Any, w: Weights, layer: Any
) -> Array:
    """A function of weights in the order of every device but a GPU, of any weights."""
    return function(x, as_quantized(w), layer, out_dtype)


def _forward(
    implementation: str | None,
    out_dtype: Any,
    x: Array,
    w: Weights,
    layer: Array | None,
) -> tuple[Array, Residuals]:
    # An empty array carries the dtype of x, which is not needed otherwise.
    out = _product(implementation, out_dtype, x, w, layer)
    return out, (x[:0], w, layer)


def backward(
    implementation: str | None,
    out_dtype: Any,
    residuals: Residuals,
    g: Array,
) -> tuple[Array, None, None]:
    """The gradient of x, with weights in its dtype: x_bar = g @ w^T."""
    like, w, layer = residuals
    weights = dequantize(as_quantized(w.take(layer)), like.dtype)
    x_bar = lax.dot_general(
        g.astype(like.dtype),
        weights,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return x_bar.astype(like.dtype), None, None


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_multiply.defvjp(_forward, backward)


def check(x: Array, w: Weights, layer: Array | int | None, out_dtype: Any) -> None:
    """Raises what `quant_matmul` says of shapes and dtypes."""
    if not isinstance(w, Weights):
        raise TypeError(
            f"w is {type(w).__name__}; give what `quantize` returns, or what "
            "`arrange_for_gpu` makes of it"
        )
    if w.ndim != (2 if layer is None else 3):
        raise ValueError(
            f"w {w.shape} with layer={layer}; give one matrix [K, N], or a stack "
            "[L, K, N] and which of them"
        )
    if x.ndim < 1 or x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"x {x.shape} and w {w.shape} do not fit; x should be [..., K] with "
            f"K={w.shape[-2]}"
        )
    names = [dtype.name for dtype in DTYPES]
    for name, dtype in (("x", x.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            raise TypeError(f"{name} is {dtype}; give one of {names}")
