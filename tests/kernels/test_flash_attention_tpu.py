"""The kernels compiled for every TPU generation; no TPU is needed, and none is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention import flash_attention, tpu
from kernels_pallas.flash_attention.schedule import Blocks

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
LENGTH, HEADS, GROUPS, HEAD_DIM = 8192, 32, 8, 128  # one layer of Llama 3 8B


def mesh_of(topology, shape=None):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.array(description.devices)
    devices = devices[:1].reshape(1, 1) if shape is None else devices.reshape(shape)
    return Mesh(devices, ("data", "tensor"))


def structs(mesh, length, heads, groups, head_dim, dtype=jnp.bfloat16):
    """q, k, v, segments; the batch over `data`, heads over `tensor`."""
    batch = mesh.shape["data"]

    def array(shape, dtype, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return [
        *(
            array((batch, length, n, head_dim), dtype, "data", None, "tensor")
            for n in (heads, groups, groups)
        ),
        array((batch, length), jnp.int32, "data"),
    ]


def loss(q, k, v, segments, **options):
    out = flash_attention(q, k, v, segments=segments, **options)
    return out.astype(jnp.float32).sum()


def compile_gradient(function, arguments):
    """The compiled gradient, checked to run in the three kernels and not in XLA."""
    gradient = jax.value_and_grad(function, argnums=(0, 1, 2))
    lowered = jax.jit(gradient).lower(*arguments)
    assert lowered.as_text().count("@tpu_custom_call") == 3
    return lowered.compile()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_and_holds_no_scores(topology):
    arguments = structs(mesh_of(topology), LENGTH, HEADS, GROUPS, HEAD_DIM)
    compiled = compile_gradient(lambda q, k, v, _: loss(q, k, v, None), arguments)
    queries = LENGTH * HEADS * HEAD_DIM * 2
    # The output and its gradient, and copies that the layouts at the ends need.
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * queries
    size = tpu.block_size(LENGTH, HEAD_DIM, jnp.bfloat16)
    scores = HEADS * Blocks(LENGTH, size, size).count * size * size
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(9 * 2 * scores * HEAD_DIM, rel=1e-3)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "shape, options",
    [
        ((2048, 4, 2, 64), dict(window=512)),
        ((2048, 4, 2, 256), dict(window=jnp.int32(512), slopes=jnp.ones(4))),
        ((2048, 4, 2, 96), dict(softcap=30.0, sinks=jnp.ones(4))),
        ((2000, 4, 2, 192), dict(causal=False, softcap=30.0)),
        ((1100, 4, 4, 80), {}),
        ((100, 2, 1, 16), {}),
    ],
)
def test_compiles_every_option(topology, shape, options):
    arguments = structs(mesh_of(topology), *shape)
    compile_gradient(lambda *x: loss(*x, **options), arguments)


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_compiles_in_float32(topology):
    arguments = structs(mesh_of(topology), 2048, 4, 2, 256, dtype=jnp.float32)
    compile_gradient(loss, arguments)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_inside_shard_map(topology):
    mesh = mesh_of(topology, shape=(2, -1))
    heads = P("data", None, "tensor")

    def total(*arrays):
        return jax.lax.psum(loss(*arrays), ("data", "tensor"))

    run = jax.shard_map(
        total, mesh=mesh, in_specs=(heads, heads, heads, P("data")), out_specs=P()
    )
    compile_gradient(run, structs(mesh, 2048, 8, 4, 128))
