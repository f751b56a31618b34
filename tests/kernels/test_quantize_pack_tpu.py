"""Quantize-pack compiled for every TPU generation; no TPU is needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantize_pack import FORMATS, quantize_pack, unpack_reduce

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def compile_for(topology, function, *shapes):
    """The program, checked to be the kernel."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices[:1]), ("one",))
    sharding = NamedSharding(mesh, P())
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes
    ]
    lowered = jax.jit(function).lower(*arguments)
    assert lowered.as_text().count("@tpu_custom_call") == 1
    return lowered.compile()


def packed_shapes(format, parts, shape, group):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    pack = functools.partial(quantize_pack, format=format, group=group)
    return [((parts, *each.shape), each.dtype) for each in jax.eval_shape(pack, x)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("format", FORMATS)
def test_packs(format, topology):
    """In one read and one write: with no memory for anything in between."""
    pack = functools.partial(quantize_pack, format=format)
    compiled = compile_for(topology, pack, ((4096, 1024), jnp.bfloat16))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("format", FORMATS)
def test_sums(format, topology):
    shapes = packed_shapes(format, 4, (4096, 1024), 256)
    reduce = functools.partial(unpack_reduce, format=format)
    compiled = compile_for(topology, reduce, *shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("format, result", [("int8", "int4"), ("fp6_e3m2", "fp8_e4m3")])
def test_sums_and_packs_stochastically(format, result, topology):
    shapes = packed_shapes(format, 4, (4096, 1024), 64)

    def reduce(packed, scales):
        key = jax.random.key(0)
        return unpack_reduce(packed, scales, format, requantize=result, key=key)

    compiled = compile_for(topology, reduce, *shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", [(1000, 1300), (5000,), (3, 700, 70)])
def test_packs_what_no_tile_divides(shape, topology):
    def pack(x):
        return quantize_pack(x, "int4", group=32, key=jax.random.key(0))

    compile_for(topology, pack, (shape, jnp.float32))
