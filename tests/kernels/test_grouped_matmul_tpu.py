"""Grouped products compiled for every TPU generation; no TPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.quant_matmul import quantize

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
# rows, depth, columns, groups: a layer of experts in training and in decoding, and
# sizes that no tile divides.
SHAPES = {
    "training": ((16384, 2048, 1408, 64), jnp.bfloat16),
    "decoding": ((64, 2048, 1408, 64), jnp.bfloat16),
    "nothing_divides": ((300, 1300, 2100, 3), jnp.float32),
    "small": ((5, 70, 30, 3), jnp.bfloat16),
}


def mesh_of(topology, axis="expert", count=1):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return Mesh(np.array(description.devices[:count]), (axis,))


def structs(mesh, shape, dtype, spec):
    """x, w and sizes, each sharded over its first dim as `spec` says."""
    rows, depth, columns, groups = shape
    sharding = NamedSharding(mesh, spec)
    return [
        jax.ShapeDtypeStruct(each, kind, sharding=sharding)
        for each, kind in (
            ((rows, depth), dtype),
            ((groups, depth, columns), dtype),
            ((groups,), jnp.int32),
        )
    ]


def loss(x, w, sizes):
    return (grouped_matmul(x, w, sizes).astype(jnp.float32) ** 2).sum()


def compile_gradient(function, arguments):
    """The compiled gradient, checked to run in the three kernels and not in XLA."""
    gradient = jax.value_and_grad(function, argnums=(0, 1))
    lowered = jax.jit(gradient).lower(*arguments)
    assert lowered.as_text().count("@tpu_custom_call") == 3
    return lowered.compile()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_without_copies_of_weights(name, topology):
    shape, dtype = SHAPES[name]
    compiled = compile_gradient(loss, structs(mesh_of(topology), shape, dtype, P()))
    rows, depth, columns, _ = shape
    results = rows * (depth + columns) * jnp.dtype(dtype).itemsize
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < results + 2 * 2**20
    flops = compiled.cost_analysis()["flops"]
    assert flops >= 3 * 2 * rows * depth * columns
    assert flops < 3.1 * 2 * rows * depth * columns + 10**6


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("format", ["int8", "int4", "fp6_e3m2", "fp8_e4m3"])
def test_compiles_with_quantized_weights(format, topology):
    """Decoded on the chip: no memory for the weights that the codes stand for."""
    x, w, sizes = structs(mesh_of(topology), (256, 2048, 1024, 8), jnp.bfloat16, P())
    quantized = jax.eval_shape(lambda w: quantize(w, format), w)
    quantized = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=w.sharding),
        quantized,
    )
    gradient = jax.value_and_grad(loss)
    lowered = jax.jit(gradient).lower(x, quantized, sizes)
    assert lowered.as_text().count("@tpu_custom_call") == 2
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**22


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_inside_shard_map(topology):
    mesh = mesh_of(topology, count=4)

    def total(*arrays):
        return jax.lax.psum(loss(*arrays), "expert")

    run = jax.shard_map(total, mesh=mesh, in_specs=(P("expert"),) * 3, out_specs=P())
    shape = (4096, 256, 512, 16)
    compile_gradient(run, structs(mesh, shape, jnp.bfloat16, P("expert")))
