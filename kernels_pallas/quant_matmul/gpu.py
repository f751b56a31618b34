"""Products with quantized weights on Hopper GPUs: what the kernel is given.

Verified: its values in JAX's interpreter of such kernels, with what the tensor core and
registers do emulated; and that the compiler makes machine code for sm_90a of it. Not
verified: a run on a GPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas import compat
from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.gpu_ring import COMPUTING
from kernels_pallas.quant_matmul.activations import Rows
from kernels_pallas.quant_matmul.gpu_kernel import Kernel, body
from kernels_pallas.quant_matmul.gpu_plan import Plan, Problem, plan, scale_rows
from kernels_pallas.quant_matmul.gpu_tensor import GpuTensor
from kernels_pallas.quant_matmul.gpu_words import TILE, permute
from kernels_pallas.quant_matmul.layouts import BLOCK
from kernels_pallas.quant_matmul.numbers import power_of_two
from kernels_pallas.quant_matmul.tensor import QuantizedTensor


def reason(w: QuantizedTensor | GpuTensor) -> str | None:
    """Why the kernel cannot multiply with these weights, or None if it can."""
    if isinstance(w, GpuTensor):
        return None
    return "its weights lie as TPUs read them; give what `arrange_for_gpu` returns"


def matmul(
    x: Float[Array, "M K"],
    w: GpuTensor,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)`, summed in float32.

    The tensor core multiplies float16 with the codes, which are exact in it. Tokens are
    divided by powers of two (`halves`). A number loses at most 2**-39 of the largest of
    its token; and one of 32 bits, which becomes two, 2**-23 of itself besides.
    """
    padded = pad_dim(x, 1, w.padded[0])
    codes, scales, pieces = halves(padded.astype(jnp.float32), x.dtype)
    product = _multiply(codes, w, layer).reshape(pieces, len(x), -1).sum(axis=0)
    return _finish(Rows(padded, None), w, layer, product * scales, out_dtype)


def matmul_rows(
    x: Rows, w: GpuTensor, layer: Int[Array, ""] | None, out_dtype: Any
) -> Float[Array, "M N"]:
    """`x @ dequantize(w)` for quantized tokens; integers are summed as integers.

    The tensor core multiplies e4m3 with e4m3; e5m2 weights meet it in float16.
    """
    codes = x.codes
    if codes.dtype == jnp.float8_e4m3fn and w.format.carrier != codes.dtype:
        codes = codes.astype(jnp.float16)
    else:
        codes = permute(codes)
    return _finish(x, w, layer, _multiply(codes, w, layer), out_dtype)


def halves(
    x: Float[Array, "M K"], given: Any
) -> tuple[Float[Array, "P K"], Float[Array, "M 1"], int]:
    """Tokens as float16 numbers, one below the other; their scales; how many.

    The largest of a token is brought to between 2**14 and 2**15, and to less if it is
    below 2**-112. Numbers of 16 bits keep the bits that are not below 2**-24, the least
    of float16; those of 32 bits become two, the second what the first leaves.

    Args:
        x: float32 [M, K].
        given: the dtype that x had; of 16 bits, or float32.
    """
    size = jnp.abs(x).max(axis=1, keepdims=True)
    exponent = (lax.bitcast_convert_type(size, jnp.int32) >> 23) - (127 + 14)
    exponent = jnp.clip(exponent, -126, 113)
    x = x * power_of_two(-exponent)
    pieces = [x]
    if given == jnp.float32:
        # Not a conversion there and back, which compilers leave out.
        first = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
        pieces = [first, jnp.where(jnp.isfinite(first), x - first, 0.0)]
    codes = jnp.concatenate([each.astype(jnp.float16) for each in pieces])
    return codes, power_of_two(exponent), len(pieces)


def _finish(
    x: Rows,
    w: GpuTensor,
    layer: Array | None,
    product: Float[Array, "M N"],
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """Less the zero points, times the scales of tokens."""
    if w.zeros is not None:
        one = w.take(layer)
        assert one.zeros is not None
        numbers = x.codes.astype(jnp.float32)
        sums = numbers.reshape(len(numbers), len(one.zeros), -1).sum(axis=-1)
        zeros = one.zeros * one.scales
        product = product - jnp.dot(sums, zeros, precision=lax.Precision.HIGHEST)
    return x.scaled(product)[:, : w.shape[-1]].astype(out_dtype)


def _multiply(x: Array, w: GpuTensor, layer: Array | None) -> Float[Array, "M N"]:
    """The kernel, and the sum of its parts; scales of weights included."""
    if layer is None:
        w = jax.tree.map(lambda each: each[None], w)
        layer = vary_like(jnp.zeros((), jnp.int32), x)
    rows, (depth, columns), chosen = len(x), w.padded, plan_of(x, w)
    kernel = Kernel(
        w.codes,
        x.dtype,
        chosen.tokens,
        chosen.tiles,
        depth // BLOCK // chosen.splits,
        chosen.stages,
        w.group,
    )
    x = pad_dim(x, 0, -(-rows // chosen.tokens) * chosen.tokens)
    arrays = {"x": x, "words": w.words, "layer": layer[None]}
    if w.group is not None:
        arrays["scales"] = w.scales
    sums = _call(kernel, arrays, chosen.splits).sum(axis=0)
    sums = sums.reshape(columns, len(x)).T[:rows]
    factor = w.codes.factor(x.dtype)
    if w.group is not None:
        return sums * factor
    scales = lax.dynamic_index_in_dim(w.scales, layer, axis=0, keepdims=False)
    return sums * (scales * factor)


def plan_of(x: Any, w: GpuTensor) -> Plan:
    """The parts of a product with tokens in the kernel's dtype."""
    groups = scale_rows(w.group)
    return plan(Problem(x.shape[0], *w.padded, w.codes.bits, x.dtype, groups))


def _call(kernel: Kernel, arrays: dict[str, Array], splits: int) -> Array:
    """float32 [splits, N/64, 64, M]."""
    x, words = arrays["x"], arrays["words"]
    (rows, depth), tiles = x.shape, words.shape[1]
    shape = (splits, tiles, TILE, rows)
    moved = x.nbytes + words.nbytes // len(words) + 4 * math.prod(shape)
    run = compat.gpu_kernel(
        functools.partial(body, kernel),
        name=f"quant_matmul_{kernel.codes.format.name}_{x.dtype.name}",
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * depth * tiles * TILE,
            transcendentals=0,
            bytes_accessed=moved,
        ),
        out_type=jax.ShapeDtypeStruct(
            shape, jnp.float32, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        scratch_types=[kernel.scratch()],
        grid=(tiles * TILE // kernel.columns, rows // kernel.tokens, splits),
        grid_names=("columns", "tokens", "split"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
    )
    return run(arrays)
