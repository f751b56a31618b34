"""The compiler's account of memory, read: sizes, peak, and who made what."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxspeed.plan import buffers, compiler, hlo, topology_devices
from jaxspeed.plan.origins import Origins

PROGRAM = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0), metadata={op_name="state[\\'w\\']"}
  %big = f32[1024]{0} broadcast(%x), metadata={op_name="big" source_file="a.py" source_line=3}
  %small = f32[512]{0} slice(%big), metadata={op_name="small"}
  %copy.1 = f32[512]{0} copy(%small)
  ROOT %out = f32[256]{0} slice(%copy.1), metadata={op_name="out"}
}
"""  # noqa: E501
ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {}:
 value: <1 x @0> (size=1024,offset=0): f32[256]{0}
allocation 1: size 1024, maybe-live-out:
 value: <5 out @0> (size=1024,offset=0): f32[256]{0}
allocation 2: size 64, thread-local:
 value: <9 add.1 @0> (size=4,offset=0): f32[]
allocation 3: size 8192, preallocated-temp:
 value: <2 big @0> (size=4096,offset=0): f32[1024]{0}
 value: <3 small @0> (size=2048,offset=4096): f32[512]{0}
 value: <4 copy.1{} (phi) @0> (size=2048,offset=0): f32[512]{0}
allocation 4: size 9999, color 1, preallocated-temp:
 value: <6 chip @1> (size=9999,offset=0): f32[2499]{0:T(128)S(1)}
"""
LIVE = """HloLiveRange (max 6):
  BufferLiveRange:
    x{}:0-6
    big{}:1-2
    small{}:2-3
    copy.1{}:3-4
    chip{}:1-4
    out{}:4-6
"""


@pytest.mark.parametrize("page", ["", " page 0,"])
def test_the_peak_is_where_most_is_alive(page):
    assignment = re.sub(
        r"(size \d+,(?: color \d+,)?)", rf"\1{page}", ASSIGNMENT
    )  # newer compilers name the page
    assert assignment.count("page") == (5 if page else 0)
    found = buffers.memory(hlo.parse(PROGRAM), assignment, LIVE)
    assert found.reserved_bytes == 1024 + 1024 + 64 + 8192
    assert found.pool_bytes == 8192
    assert found.peak_bytes == 1024 + 1024 + 4096 + 2048
    assert [(b.kind, b.bytes, b.name) for b in found.buffers] == [
        ("temporary", 4096, "big"),
        ("temporary", 2048, "small"),
        ("parameter", 1024, "x"),
        ("output", 1024, "out"),
    ]
    assert [b.source for b in found.buffers[:3]] == [
        "a.py:3 big",
        "small",
        "state['w']",
    ]
    assert found.buffers[0].shape == "f32[1024]"


def test_values_that_share_bytes_are_one_buffer():
    inside = "(size=2048,offset=4096): f32[512]{0}"
    nested = ASSIGNMENT.replace(inside, inside.replace("4096", "1024"))
    found = buffers.memory(hlo.parse(PROGRAM), nested, LIVE)
    assert found.peak_bytes == 1024 + 1024 + 4096
    assert [b.name for b in found.buffers] == ["big", "x", "out"]


def test_what_has_no_source_has_its_operands():
    assert Origins(hlo.parse(PROGRAM)).source("copy.1") == "small"


def test_no_account_is_an_error():
    with pytest.raises(ValueError, match="no buffer assignment"):
        buffers.memory(hlo.parse(PROGRAM), "", "")


def matmuls(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w) @ w


def scanned(x, w):
    def layer(x, _):
        return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None

    return jax.grad(lambda x: lax.scan(layer, x, None, length=6)[0].sum())(x)


def updated(x, w):
    return lax.fori_loop(0, 4, lambda i, x: x.at[i].set(x[i + 1] @ w), x)


def lowered(function, device):
    shape = jax.ShapeDtypeStruct(
        (512, 512), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    donated = 0 if function is updated else ()
    return jax.jit(function, donate_argnums=donated).lower(shape, shape)


@pytest.mark.parametrize("function", [matmuls, scanned, updated])
def test_sizes_are_those_of_the_memory_analysis(function):
    compiled = compiler.compile_lowered(lowered(function, jax.devices()[0]))
    found = buffers.memory(
        hlo.parse(compiled.text), compiled.assignment, compiled.live_ranges
    )
    stats = compiled.compiled.memory_analysis()
    assert found.pool_bytes == stats.temp_size_in_bytes
    arguments = [b for b in found.buffers if b.kind == "parameter"]
    assert sum(b.bytes for b in arguments) == stats.argument_size_in_bytes
    assert found.peak_bytes == sum(b.bytes for b in found.buffers)
    assert found.peak_bytes <= found.reserved_bytes


def test_a_loops_stack_of_activations_is_traced_to_its_line():
    compiled = compiler.compile_lowered(lowered(scanned, jax.devices()[0]))
    found = buffers.memory(
        hlo.parse(compiled.text), compiled.assignment, compiled.live_ranges
    )
    assert found.buffers[0].bytes == 6 * 512 * 512 * 4
    assert "test_buffers.py" in found.buffers[0].source


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:1x1", "tpu7x:1x1x1"])
def test_the_peak_on_a_tpu_is_the_compilers(topology):
    def wide(x, w):
        y = jnp.repeat(x, 16, axis=0)
        return scanned(y.reshape(-1, 2048), w).sum()

    place = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=place)
    w = jax.ShapeDtypeStruct((2048, 2048), jnp.float32, sharding=place)
    compiled = compiler.compile_lowered(jax.jit(wide).lower(x, w))
    found = buffers.memory(
        hlo.parse(compiled.text), compiled.assignment, compiled.live_ranges
    )
    stats = compiled.compiled.memory_analysis()
    assert found.peak_bytes > 6 * 16 * 4096 * 2048 * 4
    assert abs(stats.peak_memory_in_bytes / found.peak_bytes - 1) < 0.01


@pytest.mark.tpu_aot
def test_a_refused_program_is_written_down():
    place = jax.sharding.SingleDeviceSharding(topology_devices("v5e:1x1")[0])
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32, sharding=place)
    compiled = compiler.compile_lowered(jax.jit(lambda x: x @ x.T).lower(x))
    assert compiled.compiled is None
    assert compiled.refusal.limit_bytes == int(15.75 * 2**30)
    found = buffers.memory(
        hlo.parse(compiled.text), compiled.assignment, compiled.live_ranges
    )
    assert found.reserved_bytes == pytest.approx(compiled.refusal.used_bytes, rel=0.01)
    assert found.reserved_bytes >= 2 * 4 * 65536**2
