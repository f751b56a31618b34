"""The GPU kernel of quantized products, compiled to machine code; no GPU is needed."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.check import Case, measure
from kernels_pallas.quant_matmul import cases, quant_matmul
from kernels_pallas.quant_matmul.gpu_words import TILE

pytestmark = pytest.mark.gpu_aot

GPU = {case.name: case for case in cases.CASES if case.platform == "gpu"}
# Instructions per weight: goals, within what a H200's memory leaves time for. All cases
# are held to stored counts by `python -m kernels_pallas.check`.
GOALS = {
    "int8 M=16": ("HGMMA", 4.0),
    "int4 group 128 M=16": ("HGMMA", 3.5),
    "fp6_e3m2 M=16": ("HGMMA", 3.5),
    "fp6_e2m3, 8-bit tokens M=16": ("QGMMA", 2.5),
    "int8, 8-bit tokens M=40": ("IGMMA", 2.5),
    "int8, 8-bit tokens M=128": ("IGMMA", 2.5),
}
DEPTH = {"HGMMA": 16, "QGMMA": 32, "IGMMA": 32}
"""Rows of K that an instruction multiplies."""


@pytest.mark.parametrize("name", GOALS)
def test_few_instructions_per_weight_and_no_spills(name):
    (found,) = measure(GPU[name], "h200")
    assert found.status == "compiled" and not found.reason, found.reason
    figures, (product, most) = found.figures, GOALS[name]
    assert figures["instructions_per_weight"] <= most
    assert figures["tensor_core"] == [product]
    products = GPU[name].weights // TILE // DEPTH[product]
    assert figures["mix"][product] == products
    assert figures["spill_bytes"] == 0
    assert figures["shared_bytes"] <= 227 * 1024


def public(x, w):
    """Value and gradient inside of a `shard_map`, one of a stack of matrices."""
    mesh = jax.sharding.get_abstract_mesh()

    def multiply(x, w):
        return quant_matmul(x, w, layer=jnp.int32(1))

    multiply = jax.shard_map(multiply, mesh=mesh, in_specs=(P(), P()), out_specs=P())

    def total(x, w):
        return multiply(x, w).astype(jnp.float32).sum()

    return jax.value_and_grad(total)(x, w)


def test_the_public_function_compiles_unasked_inside_of_shard_map():
    x, w = cases.gpu_structs("int4", 128, 5, 512)
    w = jax.tree.map(lambda each: jax.ShapeDtypeStruct((2, *each.shape), each.dtype), w)
    (found,) = measure(Case("public", "gpu", public, (x, w)), "h200")
    assert found.status == "compiled" and not found.reason, found.reason
    assert found.figures["tensor_core"] == ["HGMMA"]
    assert found.figures["spill_bytes"] == 0
