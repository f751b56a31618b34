"""Operations and bytes of programs whose cost is known by construction."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas, topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxspeed as js
from jaxspeed import plan
from jaxspeed.plan.compiler import compile_lowered
from jaxspeed.plan.flops import flops
from kernels_pallas.flash_attention import flash_attention

M, K, N, B, LAYERS = 64, 96, 160, 6, 5


def matmul(x, w):
    return x @ w


def batched(x, y):
    return jnp.einsum("bqd,bkd->bqk", x, y)


def two_batch_dims(x, y):
    return jnp.einsum("bqhd,bkhd->bhqk", x, y)


def layers(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def gradient(x, weights):
    """Forward once, again in the backward pass, and two matmuls for the gradients."""

    def loss(x, weights):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(jnp.tanh(x @ w) @ w), None

        return jnp.sum(lax.scan(layer, x, weights)[0])

    return jax.grad(loss, (0, 1))(x, weights)


def convolution(strides, padding, image, kernel, groups=1):
    return lax.conv_general_dilated(
        image,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# Function, shapes of its arguments, operations of its matmuls.
PROGRAMS = {
    "matmul": (matmul, [(M, K), (K, N)], 2 * M * K * N),
    "vector": (matmul, [(K,), (K, N)], 2 * K * N),
    "batched": (batched, [(B, M, K), (B, N, K)], 2 * B * M * N * K),
    "two_batch_dims": (
        two_batch_dims,
        [(2, M, B, K), (2, N, B, K)],
        2 * 2 * B * M * N * K,
    ),
    "scan": (layers, [(M, K), (LAYERS, K, K)], LAYERS * 2 * M * K * K),
    # Two matmuls in the forward pass; in the backward pass the first again (the
    # second's result is not needed), and two gradients of each.
    "gradient": (
        gradient,
        [(M, K), (LAYERS, K, K)],
        LAYERS * (2 + 2 + 4) * 2 * M * K * K,
    ),
    "valid_convolution": (
        functools.partial(convolution, (1, 1), "VALID"),
        [(4, 16, 16, 8), (3, 3, 8, 32)],
        2 * 4 * 14 * 14 * 32 * 3 * 3 * 8,
    ),
    "strided_convolution": (
        functools.partial(convolution, (2, 2), "VALID"),
        [(4, 17, 17, 8), (3, 3, 8, 32)],
        2 * 4 * 8 * 8 * 32 * 3 * 3 * 8,
    ),
    # Nothing is multiplied in the padding: 3 * 16 - 2 pairs in each direction.
    "padded_convolution": (
        functools.partial(convolution, (1, 1), "SAME"),
        [(4, 16, 16, 8), (3, 3, 8, 32)],
        2 * 4 * 46 * 46 * 32 * 8,
    ),
    "grouped_convolution": (
        functools.partial(convolution, (1, 1), "VALID", groups=4),
        [(4, 16, 16, 8), (3, 3, 2, 32)],
        2 * 4 * 14 * 14 * 32 * 3 * 3 * 2,
    ),
}
# The TPU compiler makes batches of parts of these images, which overlap: it does more.
# It multiplies a vector without its matrix unit.
REWRITTEN_ON_TPU = {
    "vector",
    "valid_convolution",
    "strided_convolution",
    "padded_convolution",
}


def arguments(shapes, sharding=None):
    return [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]


@pytest.fixture(scope="module")
def tpu():
    description = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return SingleDeviceSharding(description.devices[0])


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_cpu(name):
    function, shapes, expected = PROGRAMS[name]
    found = flops(jax.jit(function).lower(*arguments(shapes)).compile())
    assert (found.matmul, found.kernels) == (expected, 0)
    assert found.total == expected
    assert found.trip_counts_known


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - REWRITTEN_ON_TPU))
def test_on_tpu(name, tpu):
    function, shapes, expected = PROGRAMS[name]
    lowered = jax.jit(function).lower(*arguments(shapes, tpu))
    text = compile_lowered(lowered).text
    assert flops(text).matmul == expected


@pytest.mark.tpu_aot
def test_rewritten_convolutions_count_as_the_compiler_counts(tpu):
    """XLA's own analysis adds the elementwise operations."""
    function, shapes, expected = PROGRAMS["padded_convolution"]
    compiled = jax.jit(function).lower(*arguments(shapes, tpu)).compile()
    found = flops(compiled)
    analysis = compiled.cost_analysis()
    assert analysis is not None
    assert expected < found.matmul <= analysis["flops"]
    assert found.matmul >= 0.95 * analysis["flops"]


def test_by_source():
    function, shapes, expected = PROGRAMS["matmul"]
    found = flops(jax.jit(function).lower(*arguments(shapes)).compile())
    ((source, count),) = found.matmul_by_source
    assert source.endswith("dot_general") and count == expected


def test_elementwise_is_apart():
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    found = flops(jax.jit(lambda x: jnp.sum(jnp.sin(x) * x + 1)).lower(x).compile())
    # Sine, product and sum of each element, and the elements folded into others.
    assert found.elementwise == 3 * 512 + 511
    assert found.total == 0


def test_loop_of_unknown_length_is_marked():
    x = jax.ShapeDtypeStruct((M, M), jnp.float32)

    def until_large(x):
        return lax.while_loop(lambda x: x[0, 0] < 100, lambda x: x @ x, x)

    found = flops(jax.jit(until_large).lower(x).compile())
    assert found.matmul == 2 * M**3
    assert not found.trip_counts_known


def test_branch_that_computes_most_counts():
    x = jax.ShapeDtypeStruct((M, M), jnp.float32)

    def either(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(jax.jit(either).lower(x).compile()).matmul == 2 * 2 * M**3


HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=1\n"

CUBLAS = """
ENTRY %main (x: bf16[8,4,16], y: bf16[8,32,16]) -> bf16[8,4,32] {
  %x = bf16[8,4,16]{2,1,0} parameter(0)
  %y = bf16[8,32,16]{2,1,0} parameter(1)
  %gemm = (bf16[8,4,32]{2,1,0}, s8[4194304]{0}) custom-call(%x, %y), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}
  ROOT %get = bf16[8,4,32]{2,1,0} get-tuple-element(%gemm), index=0
}
"""

ONEDNN = """
ENTRY %main (x: f32[4,16], y: f32[16,32]) -> f32[4,32] {
  %x = f32[4,16]{1,0} parameter(0)
  %y = f32[16,32]{1,0} parameter(1)
  ROOT %matmul = f32[4,32]{1,0} custom-call(%x, %y), \
custom_call_target="__onednn$matmul"
}
"""


@pytest.mark.parametrize(
    ("program", "expected"), [(CUBLAS, 2 * 8 * 4 * 32 * 16), (ONEDNN, 2 * 4 * 32 * 16)]
)
def test_library_calls(program, expected):
    assert flops(HEADER + program).matmul == expected


def kernel(estimate):
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def call(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(double, shape, cost_estimate=estimate)(x)

    return call


@pytest.mark.tpu_aot
def test_kernels_count_what_they_claim(tpu):
    estimate = pallas.CostEstimate(flops=1234, transcendentals=5, bytes_accessed=6789)
    call = kernel(estimate)

    def three(x, _):
        return call(x), None

    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=tpu)
    lowered = jax.jit(lambda x: lax.scan(three, x, length=3)[0]).lower(x)
    text = compile_lowered(lowered).text
    found = flops(text)
    assert (found.matmul, found.kernels, found.total) == (0, 3 * 1234, 3 * 1234)
    assert found.hbm_bytes >= 3 * 6789
    assert not found.unknown_kernels


@pytest.mark.tpu_aot
def test_kernels_that_claim_nothing_are_named(tpu):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=tpu)
    text = compile_lowered(jax.jit(kernel(None)).lower(x)).text
    found = flops(text)
    (name,) = found.unknown_kernels
    assert "test_flops.py" in name
    assert found.kernels == 0


GPU_KERNEL = """HloModule m

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %call = f32[64]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", \
api_version=API_VERSION_TYPED_FFI, \
frontend_attributes={bytes_accessed="512",flops="1234",transcendentals="5"}, \
metadata={op_name="jit(f)/kernel"}
}
"""


def test_gpu_kernels_count_what_they_claim():
    found = flops(GPU_KERNEL)
    assert (found.matmul, found.kernels, found.hbm_bytes) == (0, 1234, 512)
    assert not found.unknown_kernels
    silent = GPU_KERNEL.replace("flops=", "flaps=")
    assert flops(silent).unknown_kernels


@pytest.mark.gpu_aot
def test_gpu_attention_counts_what_it_computes():
    mesh = js.make_mesh(devices=plan.topology_devices("h200:1"))
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16, sharding=sharding)
    attend = functools.partial(flash_attention, implementation="gpu")
    found = flops(compile_lowered(jax.jit(attend).lower(x, x, x)).text)
    assert not found.unknown_kernels
    # Two matmuls over the causal half; blocks on the diagonal are computed whole.
    half = 2 * 2 * 2048**2 * 4 * 128 / 2
    assert half <= found.kernels <= 1.1 * half


LAYER_SLICE = """
%fused (p: f32[5,64,64], i: s32[], q: f32[64,64]) -> f32[64,64] {
  %p = f32[5,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,64,64]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), \
dynamic_slice_sizes={1,64,64}
  %flat = f32[64,64]{1,0} bitcast(%layer)
  ROOT %sum = f32[64,64]{1,0} add(%flat, %q)
}

ENTRY %main (p: f32[5,64,64], i: s32[], q: f32[64,64]) -> f32[64,64] {
  %p = f32[5,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[64,64]{1,0} parameter(2)
  ROOT %fusion = f32[64,64]{1,0} fusion(%p, %i, %q), kind=kLoop, calls=%fused
}
"""

UPDATE_IN_PLACE = """
%fused (p: f32[5,64,64], i: s32[], q: f32[64,64]) -> f32[5,64,64] {
  %p = f32[5,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %new = f32[1,64,64]{2,1,0} bitcast(%q)
  ROOT %update = f32[5,64,64]{2,1,0} dynamic-update-slice(%p, %new, %i, %zero, %zero)
}

ENTRY %main (p: f32[5,64,64], i: s32[], q: f32[64,64]) -> f32[5,64,64] {
  %p = f32[5,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[64,64]{1,0} parameter(2)
  ROOT %fusion = f32[5,64,64]{2,1,0} fusion(%p, %i, %q), kind=kLoop, calls=%fused
}
"""

ON_CHIP_OPERAND = """
ENTRY %main (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0:T(8,128)} parameter(0)
  %start = (f32[64,64]{1,0:T(8,128)S(1)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%p)
  %done = f32[64,64]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %negate = f32[64,64]{1,0:T(8,128)} negate(%done)
}
"""

MATRIX = 64 * 64 * 4


@pytest.mark.parametrize(
    ("program", "num_bytes"),
    [
        (LAYER_SLICE, 3 * MATRIX + 4),  # slice, q, result, and the index
        (UPDATE_IN_PLACE, 2 * MATRIX + 4),
        (ON_CHIP_OPERAND, 2 * MATRIX),
    ],
)
def test_bytes_of_device_memory(program, num_bytes):
    assert flops(HEADER + program).hbm_bytes == num_bytes


def test_bytes_of_a_matmul():
    function, shapes, _ = PROGRAMS["matmul"]
    found = flops(jax.jit(function).lower(*arguments(shapes)).compile())
    assert found.hbm_bytes == 4 * (M * K + K * N + M * N)
