"""Programs that the tests of `kernels_pallas.check` compile, in another process."""

import functools
import os

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.check import Case


def matmul(x, w):
    """bfloat16 [M, K] times [K, N] on a TPU: one step, no loop."""

    def body(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=60 * 2**20),
        name="unrolled_matmul",
    )(x, w)


def matmul_case(rows, smaller=None, depth=1024, columns=512):
    arguments = (
        jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16),
        jax.ShapeDtypeStruct((depth, columns), jnp.bfloat16),
    )
    return Case(
        f"{rows} rows",
        "tpu",
        matmul,
        arguments,
        weights=rows * depth,
        hbm_bytes=2 * rows * depth,
        smaller=smaller,
    )


def too_large(x):
    """Asks a TPU for more memory of its cores than they have."""
    return pl.pallas_call(
        lambda x, out: out.__setitem__(..., x[...] * 2),
        out_shape=x,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**20),
    )(x)


def no_kernel(x):
    return x + 1


ROWS, TILE, COLUMNS, DEPTH = 256, 128, 16, 1024


def weights_matmul(w, x, depth_tile):
    """int8 weights [N, K] times bfloat16 [M, K], on a GPU: the transposed product."""
    tiling = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    wide = plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)

    def body(w, x, out, staged):
        rows = pl.ds(lax.axis_index("rows") * TILE, TILE)

        def multiply(sum_):
            def step(_, w_tile, x_tile):
                x_tile = plgpu.transpose_ref(x_tile, (1, 0))
                plgpu.wgmma(sum_, w_tile[...].astype(jnp.bfloat16), x_tile)
                plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(
                step,
                grid=(DEPTH // depth_tile,),
                max_concurrent_steps=4,
                in_specs=[
                    plgpu.BlockSpec(
                        (TILE, depth_tile),
                        lambda k: (lax.axis_index("rows"), k),
                        transforms=wide,
                    ),
                    plgpu.BlockSpec(
                        (COLUMNS, depth_tile), lambda k: (0, k), transforms=tiling
                    ),
                ],
            )(w, x)
            return sum_[...]

        staged[...] = pl.run_scoped(multiply, plgpu.ACC((TILE, COLUMNS)))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[rows])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32),
        grid=(ROWS // TILE,),
        grid_names=("rows",),
        scratch_types=[plgpu.SMEM((TILE, COLUMNS), jnp.float32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(w, x)


def weights_case(depth_tile=128):
    return Case(
        f"int8 {depth_tile}",
        "gpu",
        functools.partial(weights_matmul, depth_tile=depth_tile),
        (
            jax.ShapeDtypeStruct((ROWS, DEPTH), jnp.int8),
            jax.ShapeDtypeStruct((COLUMNS, DEPTH), jnp.bfloat16),
        ),
        weights=TILE * depth_tile,
    )


class Exits:
    """Ends the process that reads it, as a compiler's failed assertion does."""

    def __reduce__(self):
        return os._exit, (3,)
