"""What is called differently in the versions of JAX that the kernels run on."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.arrays import vary_like


def gpu_kernel(
    body: Callable[..., None],
    *,
    name: str,
    cost_estimate: pl.CostEstimate,
    **given: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with the semantics that are the default from JAX 0.11 on.

    Args:
        body: the kernel's function.
        name: of the kernel, for profiles.
        cost_estimate: of a call; JAX before 0.12 has no place for it.
        given: further arguments of `plgpu.kernel`.
    """

    def named(*references: Any) -> None:
        body(*references)

    named.__name__ = name  # `plgpu.kernel` goes by it
    if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:
        given["cost_estimate"] = cost_estimate
    parameters = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )
    run = plgpu.kernel(named, compiler_params=parameters, **given)

    def varying(*arguments: Any) -> Any:
        # The outputs' type says of no mesh axis that they differ along it.
        arrays = jax.tree.leaves(arguments)
        return jax.tree.map(lambda x: vary_like(x, *arrays), run(*arguments))

    return varying
