"""What is called differently in the versions of JAX that the kernels run on."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.xla_metadata import set_xla_metadata

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
        cost_estimate: of a call. It stands in the compiled program as attributes of
            the call, as GPU programs have no other place for it, and is given to
            `plgpu.kernel` where that takes it (JAX 0.12).
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
    costs = {
        field: str(getattr(cost_estimate, field))
        for field in ("flops", "bytes_accessed", "transcendentals")
    }

    def varying(*arguments: Any) -> Any:
        # The outputs' type says of no mesh axis that they differ along it.
        arrays = jax.tree.leaves(arguments)
        with set_xla_metadata(**costs):
            results = run(*arguments)
        return jax.tree.map(lambda x: vary_like(x, *arrays), results)

    return varying
