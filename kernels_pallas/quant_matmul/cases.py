"""Quantized products at the sizes that `python -m kernels_pallas.check` compiles.

On TPU one block of 512 columns, K = 2048 less K = 1024: the work of a grid step that
only weights add to. On GPU K = N = 4096, through the public functions.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.check.case import Case
from kernels_pallas.quant_matmul import api, gpu, planner, tpu, w8a8
from kernels_pallas.quant_matmul.activations import Rows
from kernels_pallas.quant_matmul.chips import chip_of
from kernels_pallas.quant_matmul.gpu_tensor import GpuTensor, arrange_for_gpu
from kernels_pallas.quant_matmul.gpu_words import TILE
from kernels_pallas.quant_matmul.layouts import BLOCK
from kernels_pallas.quant_matmul.planner import Plan
from kernels_pallas.quant_matmul.tensor import QuantizedTensor, quantize

COLUMNS = 512
FORMATS = (
    ("int8", None),
    ("int4", None),
    ("int4", 128),
    ("int4", 256),
    ("fp8_e4m3", None),
    ("fp8_e5m2", None),
    ("fp6_e3m2", None),
    ("fp6_e2m3", None),
    ("mxfp4", None),
    ("nvfp4", None),
)


def one_step(x: Array, w: QuantizedTensor) -> Array:
    """The product in one grid step."""
    (rows, depth), columns = x.shape, w.shape[1]
    dot, scales_weights = planner.dot_of(rows, depth, w.group)
    plan = Plan(rows, depth, columns, True, dot, scales_weights)
    return tpu.multiply(Rows(x, None), w, None, jnp.bfloat16, chip_of(x), plan)


def _case(format: str, group: int | None, rows: int, depth: int) -> Case:
    make = functools.partial(quantize, format=format, group=group)
    shape = jax.ShapeDtypeStruct((depth, COLUMNS), jnp.bfloat16)
    w = jax.eval_shape(make, shape)
    x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
    name = format if group is None else f"{format} group {group}"
    smaller = _case(format, group, rows, depth // 2) if depth > 1024 else None
    return Case(
        f"{name} M={rows}",
        "tpu",
        one_step,
        (x, w),
        weights=depth * COLUMNS,
        hbm_bytes=w.nbytes,
        smaller=smaller,
    )


GPU_SIZE = 4096
GPU_FORMATS = (
    ("int8", None),
    ("int4", None),
    ("int4", 128),
    ("int4", 256),
    ("fp8_e4m3", None),
    ("fp8_e5m2", None),
    ("fp6_e3m2", None),
    ("fp6_e2m3", None),
)
GPU_8_BIT = (("int8", None), ("int4", 128), ("fp8_e4m3", None), ("fp6_e2m3", None))


def gpu_matmul(x: Array, w: GpuTensor) -> Array:
    """The product of the GPU kernel."""
    return api.quant_matmul(x, w, implementation="gpu")


def gpu_w8a8_matmul(x: Array, w: GpuTensor) -> Array:
    """The product of the GPU kernel with tokens of 8 bits."""
    return w8a8.w8a8_matmul(x, w, implementation="gpu")


def gpu_structs(
    format: str, group: int | None, rows: int, size: int = GPU_SIZE
) -> tuple[jax.ShapeDtypeStruct, GpuTensor]:
    """Tokens [rows, size], and a weight [size, size] in the order of a GPU."""

    def make(w: Array) -> GpuTensor:
        return arrange_for_gpu(quantize(w, format, group=group))

    w = jax.eval_shape(make, jax.ShapeDtypeStruct((size, size), jnp.bfloat16))
    return jax.ShapeDtypeStruct((rows, size), jnp.bfloat16), w


def _gpu_case(format: str, group: int | None, rows: int, eight: bool) -> Case:
    """Instructions are counted per weight of a block of 256 rows of a warpgroup."""
    x, w = gpu_structs(format, group, rows)
    dtype = jnp.int8 if w.codes.integers else jnp.float8_e4m3fn
    codes = jax.ShapeDtypeStruct(x.shape, dtype if eight else jnp.float16)
    name = format if group is None else f"{format} group {group}"
    return Case(
        f"{name}{', 8-bit tokens' if eight else ''} M={rows}",
        "gpu",
        gpu_w8a8_matmul if eight else gpu_matmul,
        (x, w),
        weights=gpu.plan_of(codes, w).tiles * TILE * BLOCK,
    )


CASES = [
    *(_case(*format, rows, 2048) for rows in (16, 128) for format in FORMATS),
    *(_gpu_case(*format, 16, False) for format in GPU_FORMATS),
    *(_gpu_case(*format, 128, False) for format in (("int4", 128), ("fp6_e3m2", None))),
    *(_gpu_case(*format, rows, True) for rows in (16, 128) for format in GPU_8_BIT),
    _gpu_case("int8", None, 40, True),
]
