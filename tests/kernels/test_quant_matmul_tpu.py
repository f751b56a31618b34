"""The kernels compiled for every TPU generation; no TPU is needed, and none is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.quant_matmul import (
    FORMATS,
    partition_specs,
    quant_matmul,
    quantize,
    w8a8_matmul,
)

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
DEPTH, COLUMNS = 4096, 14336  # the feed-forward weights of Llama 3 8B
WEIGHTS = {
    **{name: (name, {}) for name in FORMATS},
    "int4 group 128": ("int4", {"group": 128}),
    "int4 group 128 zero points": ("int4", {"group": 128, "symmetric": False}),
    "int8 zero points": ("int8", {"symmetric": False}),
}


def devices(topology, count=1):
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(found.devices[:count])


def weight(name, shape):
    format, options = WEIGHTS[name]
    struct = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.eval_shape(lambda w: quantize(w, format, **options), struct)


def place(mesh, spec, struct):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def compile_kernel(topology, name, shape, dtype=jnp.bfloat16):
    """The compiled product, checked to be the kernel."""
    rows, depth, columns = shape
    mesh = Mesh(devices(topology), ("all",))
    w = jax.tree.map(
        lambda each: place(mesh, P(), each), weight(name, (depth, columns))
    )
    x = place(mesh, P(), jax.ShapeDtypeStruct((rows, depth), dtype))
    lowered = jax.jit(quant_matmul).lower(x, w)
    assert lowered.as_text().count("@tpu_custom_call") == 1
    return lowered.compile(), w


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("name", WEIGHTS)
def test_compiles_and_writes_no_weights_out(name, rows, topology):
    compiled, w = compile_kernel(topology, name, (rows, DEPTH, COLUMNS))
    scales = w.nbytes - DEPTH * COLUMNS * w.format.numbers.bits // 8
    # Scales of groups are cut into steps; weights are read where they are.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * scales
    cost = compiled.cost_analysis()
    assert cost["flops"] == pytest.approx(2 * rows * DEPTH * COLUMNS, rel=1e-3)
    # The compiler may bring what is small on chip beforehand, and counts that too.
    small = 2 * rows * (DEPTH + COLUMNS) + scales
    assert w.nbytes <= cost["bytes accessed"] <= w.nbytes + 4 * small


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["fp6_e3m2", "int4 group 128", "mxfp4"])
def test_compiles_for_many_rows(name, topology):
    compile_kernel(topology, name, (4096, DEPTH, COLUMNS))


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("fp6_e2m3", (1, 300, 130), jnp.bfloat16),
        ("int4 group 128 zero points", (20, 500, 1000), jnp.bfloat16),
        ("int8", (300, 11008, 4096), jnp.bfloat16),
        ("fp6_e3m2", (16, 14336, 4096), jnp.float32),
        ("nvfp4", (5, 2048, 512), jnp.float16),
    ],
)
def test_compiles_any_size(name, shape, dtype, topology):
    compile_kernel(topology, name, shape, dtype)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["int4", "fp6_e3m2"])
def test_a_scan_reads_layers_where_they_lie(name, topology):
    mesh = Mesh(devices(topology), ("all",))
    w = weight(name, (4, 4096, 4096))
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    x, w = jax.tree.map(lambda each: place(mesh, P(), each), (x, w))

    def through(x, w):
        def layer(x, i):
            return quant_matmul(x, w, layer=i), None

        return jax.lax.scan(layer, x, jnp.arange(4))[0]

    compiled = jax.jit(through).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**21 < w.nbytes // 4


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "name, activations",
    [("int8", "int8"), ("int4", "int8"), ("fp6_e2m3", None), ("fp8_e5m2", None)],
)
def test_compiles_with_8_bit_activations(name, activations, topology):
    mesh = Mesh(devices(topology), ("all",))
    x = jax.ShapeDtypeStruct((128, DEPTH), jnp.bfloat16)
    w = weight(name, (DEPTH, COLUMNS))
    x, w = jax.tree.map(lambda each: place(mesh, P(), each), (x, w))
    run = functools.partial(w8a8_matmul, activations=activations)
    lowered = jax.jit(run).lower(x, w)
    assert lowered.as_text().count("@tpu_custom_call") == 1
    lowered.compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_compiles_inside_shard_map(topology):
    """K over two devices and N over two, with the gradient of x."""
    mesh = Mesh(devices(topology, 4).reshape(2, 2), ("rows", "columns"))
    w = weight("fp6_e2m3", (DEPTH, COLUMNS))
    specs = partition_specs(w, P("rows", "columns"), mesh.shape)

    def run(x, w):
        return jax.lax.psum(quant_matmul(x, w), "rows")

    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(None, "rows"), specs), out_specs=P(None, "columns")
    )

    def loss(x, w):
        return run(x, w).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((16, DEPTH), jnp.bfloat16)
    arguments = jax.tree.map(
        lambda spec, each: place(mesh, spec, each), (P(None, "rows"), specs), (x, w)
    )
    lowered = jax.jit(jax.value_and_grad(loss)).lower(*arguments)
    assert lowered.as_text().count("@tpu_custom_call") == 1
    lowered.compile()
