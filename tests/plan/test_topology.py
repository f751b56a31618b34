"""Names of topologies, and the devices they stand for."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import jaxspeed as js
from jaxspeed.chips import CHIPS, chip_of
from jaxspeed.plan import num_devices, topology_devices
from jaxspeed.plan.topology import GENERATIONS


@pytest.mark.parametrize(
    "name, count",
    [
        ("cpu:3", 3),
        ("v5e:1x1", 1),
        ("v5e:4x4", 16),
        ("v5p:1x1x1", 1),
        ("v5p:2x2x3", 12),
        ("v5p:8x8x8", 512),
        ("v5p:16x20x28", 8960),
        ("v6e:16x16", 256),
        ("tpu7x:1x1x1", 2),
        ("tpu7x:2x2x1", 8),
        ("h200:1", 1),
        ("h200:8", 8),
        ("h200:24", 24),
    ],
)
def test_devices_are_counted_without_a_compiler(name, count):
    assert num_devices(name) == count


@pytest.mark.parametrize(
    "name",
    [
        *("cpu", "cpu:0", "cpu:2x2", "v5e", "v5e:0x1", "v5e:3x3", "v5e:2x16"),
        *("v5e:32x32", "v5e:2x2x1", "v5p:2x2", "v5p:3x2x1", "v5p:2x2x29", "v6e:2x6"),
        *("tpu7x:2x2", "v4:2x2x1", "rtx:8", "v5p:-1x2x2", "v5p:2x2x1 ", ""),
        *("h200:12", "h200:2x4", "h200:0"),
    ],
)
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown topology") as error:
        num_devices(name)
    for known in ("cpu:N", "h200:N", "v5e:1x1", "v5p:1x1x1", "8x8x8", "16x16", "tpu7x"):
        assert known in str(error.value)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_examples_follow_the_rule(name):
    shapes = [f"{name}:{shape}" for shape in GENERATIONS[name].examples]
    counts = [num_devices(shape) for shape in shapes]
    assert counts == sorted(counts)


def test_cpu_devices_are_simulated_ones():
    assert topology_devices("cpu:8") == jax.devices("cpu")[:8]
    with pytest.raises(ValueError, match="needs 64 simulated devices, JAX has 8"):
        topology_devices("cpu:64")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxspeed\[plan\]'"):
        topology_devices("v5e:2x2")


def test_a_missing_gpu_compiler_is_named(monkeypatch):
    def refuse(**names):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxspeed\[check\]'"):
        topology_devices("h200:8")


@pytest.mark.gpu_aot
@pytest.mark.parametrize(("count", "hosts"), [(1, 1), (4, 1), (8, 1), (16, 2)])
def test_gpus_are_hosts_of_eight(count, hosts):
    devices = topology_devices(f"h200:{count}")
    assert len(devices) == count
    assert len({device.process_index for device in devices}) == hosts
    assert {chip_of(device) for device in devices} == {CHIPS["h200"]}


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "name",
    [
        *("v5e:1x1", "v5e:1x4", "v5e:2x4", "v5e:16x16", "v6e:1x2", "v6e:4x16"),
        *("v5p:1x1x1", "v5p:1x1x3", "v5p:2x1x1", "v5p:2x2x3", "v5p:8x8x8"),
        *("tpu7x:1x1x1", "tpu7x:2x2x1", "tpu7x:8x8x8"),
    ],
)
def test_the_compiler_takes_what_the_rule_allows(name):
    devices = topology_devices(name)
    assert len(devices) == num_devices(name)
    mesh = js.make_mesh(devices=devices)
    x = jax.ShapeDtypeStruct(
        (128, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    total = jax.shard_map(
        lambda x: jax.lax.psum(x @ x, "data"),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    assert jax.jit(total).lower(x).compile() is not None
