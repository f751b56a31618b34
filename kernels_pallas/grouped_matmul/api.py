"""Grouped matrix products: signature, gradients and dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.arrays import vary_like
from kernels_pallas.grouped_matmul import reference, tpu, weights, xla
from kernels_pallas.grouped_matmul.weights import Stored
from kernels_pallas.quant_matmul import GpuTensor, QuantizedTensor

NAME = "grouped_matmul"
DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16)))
Functions = tuple[Callable[..., Array], Callable[..., Array]]
"""On TPU and in XLA."""
NO_GPU = "there is no GPU kernel of it yet; take 'xla'"


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Stored,
    sizes: Int[Array, " G"],
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies each group of rows with the matrix of its group.

    The rows of x are sorted by group: the first `sizes[0]` of them belong to group 0,
    and so on (experts after routing; Gale et al., 2023, "MegaBlocks"). Groups may be
    empty. Rows after the last group give zeros and have no gradient; of sizes that add
    up to more than M, what is beyond M is left out. Sums are float32. Differentiable
    by x, and by w unless it is quantized. Works under `jit`, `vmap`, `grad` and inside
    `shard_map`, where it sends nothing.

    Args:
        x: rows, float32 or bfloat16.
        w: a matrix per group, [G, K, N] of the same dtype, or a `QuantizedTensor` of
            that shape with a scale for each column.
        sizes: int32, rows in each group, none negative.
        implementation: "tpu" (Pallas), "xla" (plain JAX, a loop over tiles) or
            "reference" (plain JAX, a matrix per row); None takes "tpu" where the
            program is compiled for a TPU and "xla" elsewhere.

    Returns:
        in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, an empty dim, an unknown implementation.
        TypeError: unsupported or differing dtypes, or a `GpuTensor`.
    """
    _check(x, w, sizes, implementation)
    arrays = jax.tree.leaves((x, w, sizes))
    x, w, sizes = jax.tree.map(lambda each: vary_like(each, *arrays), (x, w, sizes))
    if implementation == "reference":
        return reference.product(x, w, sizes)
    return _multiply(implementation, x, w, sizes)


def _run(implementation: str | None, functions: Functions, *arguments: Any) -> Array:
    on_tpu, in_xla = functions
    candidates = {"tpu": on_tpu, "gpu": NO_GPU, "xla": in_xla}
    return dispatch.run(NAME, implementation, candidates, *arguments)


def _product(implementation: str | None, x: Array, w: Stored, sizes: Array) -> Array:
    def on_tpu(x: Array, w: Stored, sizes: Array) -> Array:
        return tpu.product(x, weights.of(w), sizes)

    def in_xla(x: Array, w: Stored, sizes: Array) -> Array:
        return xla.product(x, weights.of(w), sizes, transposed=False)

    return _run(implementation, (on_tpu, in_xla), x, w, sizes)


def _forward(
    implementation: str | None, x: Array, w: Stored, sizes: Array
) -> tuple[Array, Any]:
    return _product(implementation, x, w, sizes), (x, w, sizes)


def _backward(
    implementation: str | None, residuals: tuple[Array, Stored, Array], d_out: Array
) -> tuple[Array, Array | None, None]:
    x, w, sizes = residuals

    def on_tpu(d_out: Array, w: Stored, sizes: Array) -> Array:
        return tpu.input_gradient(d_out, weights.of(w), sizes)

    def in_xla(d_out: Array, w: Stored, sizes: Array) -> Array:
        return xla.product(d_out, weights.of(w), sizes, transposed=True)

    dx = _run(implementation, (on_tpu, in_xla), d_out, w, sizes)
    if isinstance(w, QuantizedTensor):
        return dx, None, None
    gradients = (tpu.weight_gradient, xla.weight_gradient)
    return dx, _run(implementation, gradients, x, d_out, sizes), None


_multiply = jax.custom_vjp(_product, nondiff_argnums=(0,))
_multiply.defvjp(_forward, _backward)


def _check(x: Array, w: Stored, sizes: Array, implementation: str | None) -> None:
    candidates = {
        "tpu": tpu.product,
        "gpu": NO_GPU,
        "xla": xla.product,
        "reference": reference.product,
    }
    dispatch.check(NAME, implementation, candidates)
    if isinstance(w, GpuTensor):
        raise TypeError(
            "w is a GpuTensor, and no kernel takes it here; give what "
            "`arrange_from_gpu` returns"
        )
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1:] == w.shape[1:2]
    if not fits or sizes.shape != w.shape[:1]:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and sizes {sizes.shape} should be x [M, K], "
            "w [G, K, N] and sizes [G]"
        )
    if min(*x.shape, *w.shape) < 1:
        raise ValueError(f"x {x.shape} or w {w.shape} is empty; give at least 1 of all")
    quantized = isinstance(w, QuantizedTensor)
    if quantized:
        weights.check(w)
    if x.dtype not in DTYPES or not (quantized or x.dtype == w.dtype):
        names = [dtype.name for dtype in DTYPES]
        raise TypeError(
            f"x and w are {x.dtype} and {w.dtype}; give both the same dtype, one of "
            f"{names}"
        )
    if sizes.dtype != jnp.int32:
        raise TypeError(f"sizes are {sizes.dtype}; give int32")
