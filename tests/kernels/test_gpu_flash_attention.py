"""The GPU kernels of flash attention, compiled to machine code; no GPU is needed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.check import Case, measure
from kernels_pallas.flash_attention import cases, flash_attention

pytestmark = pytest.mark.gpu_aot

GPU = [case for case in cases.CASES if case.platform == "gpu"]


@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def test_compiles_for_the_tensor_core_and_spills_nothing(case):
    (found,) = measure(case, "h200")
    assert found.status == "compiled" and not found.reason, found.reason
    figures = found.figures
    assert figures["tensor_core"] == ["HGMMA"]
    assert figures["spill_bytes"] == 0
    assert figures["shared_bytes"] <= 227 * 1024


def public(q, k, v, implementation):
    """Value and gradients inside of a `shard_map` over the device that there is."""
    mesh = jax.sharding.get_abstract_mesh()
    attend = functools.partial(flash_attention, implementation=implementation)
    spec = P(mesh.axis_names[0])
    attend = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)

    def total(q, k, v):
        return attend(q, k, v).astype(jnp.float32).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("implementation", [None, "gpu"])
def test_the_public_function_compiles_inside_of_shard_map(implementation):
    """Unasked too, as the compiled-for device is a Hopper GPU."""
    q = jax.ShapeDtypeStruct((1, 300, 4, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 300, 1, 128), jnp.bfloat16)
    function = functools.partial(public, implementation=implementation)
    (found,) = measure(Case("public", "gpu", function, (q, k, k)), "h200")
    assert found.status == "compiled" and not found.reason, found.reason
    assert found.figures["tensor_core"] == ["HGMMA"]
    assert found.figures["spill_bytes"] == 0
