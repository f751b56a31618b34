"""Products with quantized weights on TPU (Pallas Mosaic): what the kernel is given."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.quant_matmul import planner
from kernels_pallas.quant_matmul.activations import Rows
from kernels_pallas.quant_matmul.chips import Chip, chip_of
from kernels_pallas.quant_matmul.planner import Plan, Problem
from kernels_pallas.quant_matmul.tensor import QuantizedTensor
from kernels_pallas.quant_matmul.tpu_call import call

PIECES = {"bfloat16": 1, "float16": 2, "float32": 3}
"""bfloat16 numbers that add up to one of a dtype."""


def matmul(
    x: Float[Array, "M K"],
    w: QuantizedTensor,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)`, summed in float32.

    The matrix unit multiplies bfloat16 with the codes, exactly; a float32 x is cut into
    three bfloat16 numbers, which are rows of their own.
    """
    rows, count = len(x), PIECES[x.dtype.name]
    x = pad_dim(x, 1, w.padded[0])
    if count == 1:
        return multiply(Rows(x, None), w, layer, out_dtype, chip_of(x))
    x = jnp.concatenate(_pieces(x.astype(jnp.float32), count))
    products = multiply(Rows(x, None), w, layer, jnp.float32, chip_of(x))
    return products.reshape(count, rows, -1).sum(axis=0).astype(out_dtype)


def matmul_rows(
    x: Rows, w: QuantizedTensor, layer: Int[Array, ""] | None, out_dtype: Any
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)` for quantized tokens; integers are summed as integers."""
    chip = chip_of(x.codes)
    if x.codes.dtype == jnp.float8_e4m3fn and not chip.has_e4m3fn:
        x = Rows(x.values(jnp.bfloat16), x.scales)
    return multiply(x, w, layer, out_dtype, chip)


def multiply(
    x: Rows,
    w: QuantizedTensor,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
    chip: Chip,
    plan: Plan | None = None,
) -> Float[Array, "M N"]:
    """The kernel.

    Args:
        x: bfloat16 or codes, with the padded K of `w`.
        w: one matrix, or a stack of them.
        layer: which of the stack, or None.
        out_dtype: of the result.
        chip: that the program is compiled for.
        plan: the blocks; None: the planner's.
    """
    out_dtype = jnp.dtype(out_dtype)
    if plan is None:
        plan = plan_of(x.codes, w, out_dtype, chip)
    if layer is None:
        w = jax.tree.map(lambda each: each[None], w)
        layer = vary_like(jnp.zeros((), jnp.int32), x.codes)
    return call(x, w, layer[None], plan, chip, out_dtype)


def plan_of(x: Array, w: QuantizedTensor, out_dtype: Any, chip: Chip) -> Plan:
    """The blocks of a call with bfloat16 `x`."""
    depth, columns = w.padded
    matrices = w.lead[0] if w.lead else 1
    bits = 8 * w.nbytes / (matrices * depth * columns)
    out_bytes = jnp.dtype(out_dtype).itemsize
    problem = Problem(len(x), depth, columns, bits, w.group, out_bytes)
    return planner.plan(problem, chip)


def _pieces(x: Array, count: int) -> list[Array]:
    """Numbers of bfloat16 whose sum is `x`, the largest first."""
    pieces = []
    for _ in range(count):
        # Not a conversion there and back, which compilers leave out.
        piece = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        pieces.append(piece.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(piece), x - piece, 0.0)
    return pieces
