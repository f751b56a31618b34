"""Figures of chips, and which chip a device is."""

import types

import jax
import pytest
from jax.experimental import topologies

from jaxspeed.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_by_device_kind(kind, name):
    chip = chip_of(types.SimpleNamespace(device_kind=kind))
    assert chip is not None and chip.name == name


def test_cpu_is_not_known():
    assert chip_of(jax.devices("cpu")[0]) is None


def test_published_totals_per_chip():
    """Operations, bytes per second and link bandwidth of the vendors' tables."""
    both_directions = {
        name: 2 * chip.links * chip.link_bytes_per_second / 1e9
        for name, chip in CHIPS.items()
    }
    assert both_directions == {
        "v5e": 400,
        "v5p": 1200,
        "v6e": 800,
        "tpu7x": 1200,  # shared by the two devices of a chip
        "a100": 600,
        "h100": 900,
        "h200": 900,
    }
    assert 2 * CHIPS["tpu7x"].bf16_flops == 2307e12
    assert 2 * CHIPS["tpu7x"].hbm_bytes == 192 * 2**30


def test_no_more_is_usable_than_there_is():
    for chip in CHIPS.values():
        assert 0.95 * chip.hbm_bytes < chip.usable_hbm_bytes <= chip.hbm_bytes


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)],
)
def test_devices_of_topologies(topology, devices):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    assert len(description.devices) == devices
    chip = chip_of(description.devices[0])
    assert chip is not None and chip.name == topology.split(":")[0]


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_refuses_more_than_the_usable_memory(topology):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    device = description.devices[0]
    chip = chip_of(device)
    assert chip is not None
    sharding = jax.sharding.SingleDeviceSharding(device)
    whole = jax.ShapeDtypeStruct(
        (chip.usable_hbm_bytes // 8 + 2**22,), jax.numpy.float32, sharding=sharding
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x + 1).lower(whole).compile()
    usable = chip.usable_hbm_bytes / 2**30
    assert f"exceeds available HBM ({usable:.2f}G)" in str(error.value)
