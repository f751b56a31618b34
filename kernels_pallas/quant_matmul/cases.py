"""Quantized products at the sizes that `python -m kernels_pallas.check` compiles.

One block of 512 columns, K = 2048 less K = 1024: the work of a grid step that only
weights add to.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.check.case import Case
from kernels_pallas.quant_matmul import planner, tpu
from kernels_pallas.quant_matmul.activations import Rows
from kernels_pallas.quant_matmul.chips import chip_of
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


CASES = [
    _case(format, group, rows, 2048) for rows in (16, 128) for format, group in FORMATS
]
