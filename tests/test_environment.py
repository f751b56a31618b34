"""The report on what there is, and on what is not there."""

import json
import re
from types import SimpleNamespace

import jax
import jaxlib
import pytest

from jaxspeed import environment as env


def device(platform="cpu", kind="cpu", **attributes):
    defaults = {"process_index": 0, "memory_stats": lambda: None}
    return SimpleNamespace(
        platform=platform, device_kind=kind, **(defaults | attributes)
    )


def chip(x, y, *, slice_index=0):
    stats = {"bytes_limit": 16 * 2**30}
    return device(
        "tpu",
        "TPU v5 lite",
        coords=(x, y, 0),
        core_on_chip=0,
        slice_index=slice_index,
        memory_stats=lambda: stats,
    )


def facts(monkeypatch, devices, versions=()):
    """The environment with these devices and packages."""
    monkeypatch.setattr(jax, "devices", lambda: devices)
    processes = {device.process_index for device in devices}
    monkeypatch.setattr(jax, "process_count", lambda: len(processes))
    monkeypatch.setattr(env, "_version", lambda name: dict(versions).get(name))
    return env.environment()


def test_this_process(tmp_path):
    found, lines = env.report(device_folder=str(tmp_path))
    assert found["packages"]["jax"] == jax.__version__
    assert found["packages"]["jaxlib"] == jaxlib.__version__
    assert found["backend"] == "cpu" and found["backend_error"] is None
    assert found["devices"] == [{"kind": "cpu", "count": 8, "memory_bytes": None}]
    assert found["simulated_devices"] == 8 and found["processes"] == 1
    assert found["host"]["cores"] >= 1 and found["host"]["memory_bytes"] > 2**27
    assert json.loads(json.dumps(found)) == found
    assert "devices       8 x cpu (simulated)" in lines
    assert "interconnect  shared memory" in lines
    assert any("everything runs on simulated CPU devices" in line for line in lines)


def test_tpu_topology(monkeypatch, tmp_path):
    chips = [chip(x, y, slice_index=s) for s in (0, 1) for x in (0, 1) for y in (4, 5)]
    found = facts(monkeypatch, chips)
    assert found["devices"] == [
        {"kind": "TPU v5 lite", "count": 8, "memory_bytes": 2**34}
    ]
    assert found["simulated_devices"] == 0
    assert found["interconnect"] == {
        "links": "ICI, chips 2x2x1, in each of 2 slices; the network between them",
        "topology": "2x2x1",
        "cores": 1,
        "slices": 2,
    }
    _, lines = env.report(found, device_folder=str(tmp_path))
    assert "devices       8 x TPU v5 lite, 16.0 GiB each" in lines
    assert not any("simulated" in line for line in lines)


def test_gpus_of_two_processes(monkeypatch, tmp_path):
    gpus = [device("gpu", "NVIDIA H100", process_index=i // 2) for i in range(4)]
    found = facts(monkeypatch, gpus)
    assert found["interconnect"]["links"] == (
        "NVLink or PCIe within each of 2 processes, the network between them"
    )
    _, lines = env.report(found, device_folder=str(tmp_path))
    assert "devices       4 x NVIDIA H100; in 2 processes" in lines


def test_extras_that_are_missing(monkeypatch, tmp_path):
    found, _ = env.report(facts(monkeypatch, [device()]), device_folder=str(tmp_path))
    advice = found["missing"]
    for package, extra in (
        ("libtpu", "plan"),
        ("tokenizers", "hf"),
        ("gin-config", "gin"),
    ):
        (line,) = [line for line in advice if line.startswith(f"{package}:")]
        assert line.endswith(f"pip install 'jaxspeed[{extra}]'")
    versions = {"libtpu": "0.0.42", "tokenizers": "0.20", "gin-config": "0.5"}
    found, _ = env.report(
        facts(monkeypatch, [device()], versions), device_folder=str(tmp_path)
    )
    (line,) = found["missing"]
    assert line.startswith("accelerator: everything runs on simulated CPU devices")


@pytest.mark.parametrize(
    ("file", "package", "advice"),
    [
        ("nvidia0", None, "GPU: .*nvidia0 shows one; pip install 'jaxspeed.gpu.'"),
        ("nvidia0", "jax-cuda13-plugin", "GPU: .*installed but not in use"),
        ("accel0", None, "TPU: .*accel0 shows one; pip install 'jaxspeed.tpu.'"),
        ("vfio/0", "libtpu", "TPU: .*vfio/0 .*installed but not in use"),
    ],
)
def test_hardware_that_is_not_used(monkeypatch, tmp_path, file, package, advice):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    found = facts(monkeypatch, [device()], {package: "1.0"})
    found, _ = env.report(found, device_folder=str(tmp_path))
    assert any(re.match(advice, line) for line in found["missing"])
    assert not any(line.startswith("accelerator") for line in found["missing"])


def test_backend_that_does_not_start(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    found, lines = env.report(device_folder=str(tmp_path))
    assert found["backend"] is None and found["devices"] == []
    assert "devices       none" in lines
    assert any("Unable to initialize backend 'cuda'" in line for line in lines)


def test_devices_that_tell_nothing(monkeypatch):
    def unknown():
        raise NotImplementedError

    silent = [device("tpu", "TPU", memory_stats=unknown) for _ in range(2)]
    found = facts(monkeypatch, silent)
    assert found["devices"] == [{"kind": "TPU", "count": 2, "memory_bytes": None}]
    assert found["interconnect"]["links"] == "ICI, coordinates unknown"
