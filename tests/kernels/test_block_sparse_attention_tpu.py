"""The kernels compiled for every TPU generation; no TPU is needed, and none is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.block_sparse_attention import (
    BigBirdLayout,
    FixedLayout,
    block_sparse_attention,
    scheduled_fraction,
)

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
LENGTH, HEADS, GROUPS, HEAD_DIM = 8192, 4, 1, 128


def mesh_of(topology, devices=1):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return Mesh(np.array(description.devices[:devices]), ("tensor",))


def structs(mesh, heads, groups, segments=False):
    """q, k, v, segments of one sequence; heads over `tensor`."""

    def array(shape, dtype, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return [
        *(
            array((1, LENGTH, n, HEAD_DIM), jnp.bfloat16, None, None, "tensor")
            for n in (heads, groups, groups)
        ),
        array((1, LENGTH), jnp.int32) if segments else None,
    ]


def compile_gradient(function, arguments):
    """The compiled gradient, checked to run in the three kernels and not in XLA."""
    gradient = jax.value_and_grad(function, argnums=(0, 1, 2))
    lowered = jax.jit(gradient).lower(*arguments)
    assert lowered.as_text().count("@tpu_custom_call") == 3
    return lowered.compile()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["fixed", "bigbird"])
def test_compiles_and_holds_no_scores(topology, name):
    """Small blocks in another order; large ones, a list per head, and documents."""
    if name == "fixed":
        layout = FixedLayout(num_heads=HEADS, attention="unidirectional")
    else:
        layout = BigBirdLayout(
            num_heads=HEADS, block=128, different_layout_per_head=True
        )
    blocks = layout(LENGTH)

    def loss(q, k, v, segments):
        out = block_sparse_attention(
            q, k, v, blocks, block=layout.block, segments=segments
        )
        return out.astype(jnp.float32).sum()

    arguments = structs(mesh_of(topology), HEADS, GROUPS, segments=name != "fixed")
    compiled = compile_gradient(loss, arguments)
    queries = LENGTH * HEADS * HEAD_DIM * 2
    # The output, gradients, and copies in the order of the kernels.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * queries
    work = scheduled_fraction(blocks, block=layout.block)
    scores = HEADS * work.scheduled * LENGTH * (LENGTH + layout.block) / 2
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(9 * 2 * scores * HEAD_DIM, rel=1e-3)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_with_heads_split_over_devices(topology):
    mesh = mesh_of(topology, devices=2)
    layout = FixedLayout(
        num_heads=8,
        block=256,
        different_layout_per_head=True,
        num_different_global_patterns=4,
        attention="unidirectional",
    )(LENGTH)

    def total(q, k, v, _):
        first = jax.lax.axis_index("tensor") * q.shape[2]
        out = block_sparse_attention(q, k, v, layout, block=256, first_head=first)
        return jax.lax.psum(out.astype(jnp.float32).sum(), "tensor")

    heads = P(None, None, "tensor")
    run = jax.shard_map(
        total, mesh=mesh, in_specs=(heads, heads, heads, None), out_specs=P()
    )
    compile_gradient(run, structs(mesh, 8, 4))
