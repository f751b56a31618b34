"""The text of compiled programs, also where jaxlib cannot print it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxspeed.mesh import make_mesh
from jaxspeed.plan import collectives
from jaxspeed.plan.compiler import compile_lowered
from jaxspeed.plan.text import UnreadableProgramError, text_of


class Unprintable:
    def as_text(self):
        raise jax.errors.JaxRuntimeError("async-update instruction should have 1")


def test_program_that_jaxlib_cannot_print():
    with pytest.raises(UnreadableProgramError, match="compile_lowered"):
        text_of(Unprintable())  # pyright: ignore[reportArgumentType]


def test_text_is_passed_on():
    assert text_of("HloModule f") == "HloModule f"


def test_text_on_cpu():
    lowered = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    compilation = compile_lowered(lowered)
    assert compilation.compiled is not None
    assert compilation.text == compilation.compiled.as_text()
    assert compilation.text.startswith("HloModule jit_sin")


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_text_from_the_compiler(topology, monkeypatch):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = make_mesh(devices=description.devices)

    def layers(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ lax.all_gather(weight, "data", tiled=True)), None

        return lax.scan(layer, x, weights)[0]

    specs = PartitionSpec("data"), PartitionSpec(None, "data")
    shapes = (256 * mesh.size, 512), (3, 512, 512)
    sharded = jax.shard_map(
        layers, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )
    lowered = jax.jit(sharded).lower(
        *(
            jax.ShapeDtypeStruct(
                shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
            )
            for shape, spec in zip(shapes, specs, strict=True)
        )
    )
    monkeypatch.setattr(jax.stages.Compiled, "as_text", Unprintable.as_text)
    text = compile_lowered(lowered).text
    (found,) = collectives(text, mesh)
    assert (found.op, found.count) == ("all-gather", 3)
    assert found.bytes_sent == 3 * 512 * 512 * 2 * (mesh.size - 1) // mesh.size
