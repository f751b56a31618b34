"""Paged attention compiled for every TPU generation; no TPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.paged_attention import paged_attention, pages_shape

pytestmark = pytest.mark.tpu_aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
LANES = 128
# tokens, sequences, pages of each, (heads, key heads, head dim, page), dtypes, window:
# Llama 3 8B decoding and with prompts in between, and what is odd.
SHAPES = {
    "decode": ((64, 64, 64), (32, 8, 128, 32), (jnp.bfloat16, jnp.bfloat16), None),
    "mixed": ((2048, 32, 64), (32, 8, 128, 32), (jnp.bfloat16, jnp.int8), None),
    "fp8": ((256, 8, 16), (16, 8, 64, 32), (jnp.bfloat16, jnp.float8_e4m3fn), 512),
    "odd": ((13, 3, 5), (3, 1, 80, 8), (jnp.float32, jnp.float32), 20),
}


def structs(name, sharding):
    (tokens, sequences, slots), sizes, (dtype, stored), _ = SHAPES[name]
    heads, groups, head_dim, page = sizes

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    new = array((tokens, groups, head_dim), dtype)
    shape = pages_shape(sequences * slots, page, groups, head_dim)
    return {
        "q": array((tokens, heads, head_dim), dtype),
        "pages": array(shape, stored),
        "table": array((sequences, slots)),
        "lengths": array((sequences,)),
        "starts": array((sequences + 1,)),
        "new": (new, new),
        "scales": array((groups, 2), jnp.float32),
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_and_keeps_the_pages_where_they_are(name, topology):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices[:1]), ("one",))
    given = structs(name, NamedSharding(mesh, P()))
    pages, window = given.pop("pages"), SHAPES[name][-1]

    def call(pages, rest):
        return paged_attention(pages=pages, window=window, **rest)

    lowered = jax.jit(call, donate_argnums=0).lower(pages, given)
    assert lowered.as_text().count("@tpu_custom_call") == 2
    memory = lowered.compile().memory_analysis()
    vectors = sum(
        x.size // x.shape[-1] * max(x.shape[-1], LANES) * x.dtype.itemsize
        for x in jax.tree.leaves((given["q"], given["new"]))
    )
    # Transposed queries, results and new tokens, in tiles of whole lanes.
    assert memory.temp_size_in_bytes < 8 * vectors + 2**21
    if name != "odd":
        assert memory.alias_size_in_bytes >= pages.size * pages.dtype.itemsize
