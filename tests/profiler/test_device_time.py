"""Where device time goes, from traces of each kind of device."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxspeed as js
from jaxspeed.profiler.device_time import device_time, newest_trace


def event(name, start, end, **stats):
    return types.SimpleNamespace(
        name=name, start_ns=start, end_ns=end, stats=list(stats.items())
    )


def plane(name, **lines):
    return types.SimpleNamespace(
        name=name,
        lines=[types.SimpleNamespace(name=n, events=e) for n, e in lines.items()],
    )


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Reads a trace of given planes."""

    def of(*planes):
        trace = types.SimpleNamespace(planes=planes)
        reader = types.SimpleNamespace(from_file=lambda path: trace)
        monkeypatch.setattr(jax.profiler, "ProfileData", reader)
        return device_time(tmp_path)

    return of


def test_tpu_lines(read):
    """A loop encloses its body, and only an operation's own name says what it is."""
    ops = [
        event("%while.1 = (s32[]) while(%tuple.1)", 0, 60),
        event("%fusion.2 = f32[8] fusion(f32[8] %all-gather-done.1)", 0, 40),
        event("%all-gather-done.1 = f32[8] all-gather-done(%a)", 40, 60),
        event("%all-reduce-scatter.3 = f32[8] fusion(%b)", 80, 100),
    ]
    steps = [event("1", 0, 100)]
    found = read(
        plane("/device:TPU:0", **{"XLA Ops": ops, "Steps": steps}),
        plane("/device:TPU:0 SparseCore 0", **{"XLA Ops": ops[:1]}),
    )
    assert found.compute == pytest.approx(0.4)
    assert found.collectives == pytest.approx(0.4)
    assert found.idle == pytest.approx(0.2) and found.devices == 1


def test_gpu_streams_hide_communication(read):
    compute = [event("gemm_fusion", 0, 50), event("loop_fusion", 70, 80)]
    nccl = [event("ncclDevKernel_AllGather", 30, 75), event("ncclDevKernel", 90, 100)]
    streams = {"Stream #1(Compute)": compute, "Stream #2": nccl}
    other = {"Stream #1(Compute)": [event("gemm", 0, 10)]}
    found = read(plane("/device:GPU:0", **streams), plane("/device:GPU:1", **other))
    # Of 45 units the gather is alone in 20; the second device only computes.
    assert found.compute == pytest.approx((0.6 + 1) / 2)
    assert found.collectives == pytest.approx(0.3 / 2)
    assert found.idle == pytest.approx(0.1 / 2) and found.devices == 2


def test_no_operation(read):
    assert read(plane("/host:CPU", python=[event("train", 0, 5)])) is None


def test_simulated_devices(tmp_path):
    mesh = js.make_mesh(data=8)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P())
    def step(x):
        return lax.psum(jnp.tanh(x @ x.T), "data")

    x = jnp.ones((64, 32))
    step(x).block_until_ready()
    assert newest_trace(tmp_path) is None
    with jax.profiler.trace(tmp_path):
        step(x).block_until_ready()
    found = device_time(newest_trace(tmp_path))
    assert found.devices == 8
    assert found.compute > 0 and found.collectives > 0 and found.idle >= 0
    assert found.compute + found.collectives + found.idle == pytest.approx(1)
