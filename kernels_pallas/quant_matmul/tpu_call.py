"""The call of the TPU kernel: grid, blocks, cost.

Weights are a stack of matrices, and the kernel is told which one it multiplies with:
that of a layer is read where it lies, never copied out of the stack.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul.activations import Rows
from kernels_pallas.quant_matmul.chips import Chip
from kernels_pallas.quant_matmul.layouts import Slabs
from kernels_pallas.quant_matmul.planner import Plan
from kernels_pallas.quant_matmul.tensor import QuantizedTensor
from kernels_pallas.quant_matmul.tpu_kernel import Operands, Weights, body


def call(
    x: Rows,
    w: QuantizedTensor,
    layer: Int[Array, "1"],
    plan: Plan,
    chip: Chip,
    out_dtype: Any,
) -> Float[Array, "M N"]:
    """Multiplies `x` with matrix `layer` of the stack `w` [L, K, N]."""
    operands = _operands(x, w, plan)
    (rows, depth), columns = x.codes.shape, w.shape[-1]
    grid = (
        pl.cdiv(rows, plan.rows),
        pl.cdiv(w.padded[1], plan.columns),
        depth // plan.depth,
    )
    specs = _specs(w, plan)
    used = [name for name, array in vars(operands).items() if array is not None]
    varying = jax.typeof(x.codes).manual_axis_type
    run = pl.pallas_call(
        functools.partial(body, plan, _weights(w, chip)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[Operands(**{name: specs[name] for name in used})],
            out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda m, n, *_: (m, n)),
            scratch_shapes=[pltpu.VMEM((plan.rows, plan.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (rows, columns), out_dtype, manual_axis_type=varying
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY),
            vmem_limit_bytes=chip.vmem_limit,
        ),
        cost_estimate=_cost(x, w, out_dtype),
        name=f"quant_matmul_{w.format_name}_{x.codes.dtype.name}",
    )
    return run(layer, operands)


def _cost(x: Rows, w: QuantizedTensor, out_dtype: Any) -> pl.CostEstimate:
    (rows, depth), columns = x.codes.shape, w.shape[-1]
    out_bytes = rows * columns * jnp.dtype(out_dtype).itemsize
    weight_bytes = w.nbytes // w.lead[0]
    return pl.CostEstimate(
        flops=2 * rows * depth * columns,
        transcendentals=0,
        bytes_accessed=x.codes.nbytes + weight_bytes + out_bytes,
    )


def _weights(w: QuantizedTensor, chip: Chip) -> Weights:
    """The carrier that the chip reads, and what its numbers are short of."""
    carrier, factor = w.format.carrier, w.format.factor
    if carrier == jnp.float8_e4m3fn and not chip.has_e4m3fn:
        carrier, factor = jnp.dtype(jnp.float8_e4m3b11fnuz), factor * 2.0**4
    return Weights(w.format.layout, carrier, factor)


def _operands(x: Rows, w: QuantizedTensor, plan: Plan) -> Operands:
    """Arrays in the shapes that blocks are cut from."""
    steps, columns = w.padded[0] // plan.depth, w.padded[1]
    shape = (w.lead[0], steps if w.group else 1, -1, columns)
    groups, zeros, column = None, None, None
    if w.group is None and w.zeros is None:
        column = w.scales
    else:
        groups = w.scales.reshape(shape)
    if w.zeros is not None:
        zeros = w.zeros.reshape(shape)
    if w.tensor_scale is not None:
        column = jnp.broadcast_to(w.tensor_scale, (w.lead[0], 1, columns))
    if groups is not None and groups.dtype == jnp.float8_e8m0fnu:
        groups = lax.bitcast_convert_type(groups, jnp.uint8)
    return Operands(x.codes, w.data, groups, zeros, column, x.scales)


def _specs(w: QuantizedTensor, plan: Plan) -> dict[str, pl.BlockSpec]:
    """The blocks of a step, for each of the operands."""
    layout, columns = w.format.layout, plan.columns
    if plan.whole_x:
        x = pl.BlockSpec((plan.rows, w.padded[0]), lambda m, n, k, layer: (m, 0))
    else:
        x = pl.BlockSpec((plan.rows, plan.depth), lambda m, n, k, layer: (m, k))
    shape = layout.data_shape(plan.depth, columns)
    if isinstance(layout, Slabs):
        data = _of_layer(shape, lambda n, k: (k, 0, 0, n))
    else:
        data = _of_layer(shape, lambda n, k: (k, n))
    if w.group is None:
        group = _of_layer((None, 1, columns), lambda n, k: (0, 0, n))
    else:
        shape = (None, plan.depth // w.group, columns)
        group = _of_layer(shape, lambda n, k: (k, 0, n))
    return {
        "x": x,
        "data": data,
        "groups": group,
        "zeros": group,
        "column": _of_layer((1, columns), lambda n, k: (0, n)),
        "row": pl.BlockSpec((plan.rows, 1), lambda m, n, k, layer: (m, 0)),
    }


def _of_layer(
    shape: tuple[int | None, ...], index: Callable[[Any, Any], tuple[Any, ...]]
) -> pl.BlockSpec:
    """Blocks of the matrix that the scalar argument names."""

    def index_map(m: Any, n: Any, k: Any, layer: Any) -> tuple[Any, ...]:
        return layer[0], *index(n, k)

    return pl.BlockSpec((None, *shape), index_map)
