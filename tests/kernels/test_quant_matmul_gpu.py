"""The GPU kernel of quantized products, without a GPU.

Its words are compared with the formats code by code, the order of registers with
Mosaic GPU's own, and, where JAX has an interpreter of such kernels (from 0.11 on), it
is run with registers and the tensor core emulated. `test_gpu_quant_matmul.py` compiles
it to machine code.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import gpu_fragments
from kernels_pallas.gpu_fragments import Operand
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.quant_matmul import (
    FORMATS,
    arrange_for_gpu,
    arrange_from_gpu,
    dequantize,
    gpu,
    gpu_products,
    partition_specs,
    quant_matmul,
    quantize,
    to_arrays,
    to_two_planes,
    w8a8_matmul,
)
from kernels_pallas.quant_matmul.gpu_plan import Problem, plan
from kernels_pallas.quant_matmul.gpu_words import Codes, permute

NAMES = [name for name, each in FORMATS.items() if each.group is None]


def weight(name, shape=(512, 128), group=None, **given):
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(size=shape), jnp.float32)
    return quantize(w, name, group=group, **given)


def all_codes(format, shape=(512, 128)):
    """Every code of a format, somewhere in a matrix; what is no number is 0."""
    random = np.random.default_rng(0)
    codes = random.permutation(np.arange(np.prod(shape)) % 2**format.numbers.bits)
    codes = codes.reshape(shape).astype(np.uint8)
    if format.name.startswith("fp8"):
        codes = np.where((codes & 127) > format.numbers.top, 0, codes)
    return jnp.asarray(codes, jnp.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_words_are_the_codes_and_back(name):
    w = weight(name, (2, 300, 200))
    arranged = arrange_for_gpu(w)
    bits = w.format.numbers.bits
    assert arranged.words.shape == (2, 4, 2, 2 * bits, 256)
    assert (arranged.shape, arranged.nbytes) == (w.shape, w.nbytes)
    jax.tree.map(np.testing.assert_array_equal, arrange_from_gpu(arranged), w)


@pytest.mark.parametrize("dtype", ["float16", "8 bits"])
@pytest.mark.parametrize("name", NAMES)
def test_operands_of_the_tensor_core_are_exactly_the_numbers(name, dtype):
    format = FORMATS[name]
    codes = Codes(format)
    if dtype == "float16":
        dtype = jnp.float16
    else:
        dtype = jnp.int8 if name.startswith("int") else format.carrier
    data = format.pack(all_codes(format))
    words, numbers = codes.pack(data), np.asarray(format.values(data))
    for tile, block in np.ndindex(words.shape[:2]):
        read = words[tile, block]
        operands = codes.operands(
            lambda row, rows, read=read: read[row : row + rows], dtype
        )
        for i, operand in enumerate(operands):
            found = gpu_fragments.emulated(operand, dtype).astype(jnp.float32)
            rows = slice(256 * block + 64 * i, 256 * block + 64 * (i + 1))
            want = numbers[rows, 64 * tile : 64 * (tile + 1)].T
            if dtype != jnp.float16:
                want = permute(jnp.asarray(want))
            np.testing.assert_array_equal(found * codes.factor(dtype), want)


def places(layout, shape):
    """Which element is in which register of which thread: Mosaic GPU's own layout."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, dims = index.shape[: -len(tile)], index.shape[-len(tile) :]
        counts = [size // part for size, part in zip(dims, tile, strict=True)]
        split = [each for pair in zip(counts, tile, strict=True) for each in pair]
        index = index.reshape(*outer, *split)
        first = len(outer)
        order = [*range(0, len(split), 2), *range(1, len(split), 2)]
        index = index.transpose(*range(first), *(first + i for i in order))
    threads = (*layout.warp_dims, *layout.lane_dims, layout.vector_dim)
    last = range(-len(threads), 0)
    index = np.moveaxis(index, [i + index.ndim for i in threads], list(last))
    return index.reshape(-1, 128, index.shape[-1])


@pytest.mark.parametrize(
    "layout, dtype",
    [(plgpu.Layout.WGMMA, jnp.uint16), (plgpu.Layout.WGMMA_8BIT, jnp.uint8)],
)
def test_registers_are_in_the_order_of_the_tensor_core(layout, dtype):
    """What is emulated is what the compiler is told."""
    want = places(layout.to_mgpu(), (64, 64))
    registers, _, per_word = want.shape
    # Words of which every part is the number of the register, or of the thread.
    shape = (registers // 4, 128, 4)
    register = 4 * np.arange(registers // 4)[:, None, None] + np.arange(4)
    thread = np.arange(128)[:, None]
    repeated = 0x01010101 if per_word == 4 else 0x00010001

    def spread(numbers):
        words = np.broadcast_to(numbers, shape).reshape(-1, 256) * repeated
        order = np.arange(registers)[None]
        words = jnp.asarray(words, jnp.uint32)
        return np.asarray(
            gpu_fragments.emulated(Operand([words], order), dtype)
        ).ravel()

    np.testing.assert_array_equal(
        spread(register)[want], np.arange(registers)[:, None, None] + 0 * want
    )
    np.testing.assert_array_equal(spread(thread)[want], thread + 0 * want)


@pytest.fixture
def interpreted(monkeypatch):
    """GPU kernels run on CPU; registers and the tensor core by jnp."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no public interpreter of GPU kernels")
    kernel = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(plgpu, "kernel", kernel)
    monkeypatch.setattr(gpu_fragments, "fragments", gpu_fragments.emulated)

    def accumulate(total, parts):
        for left, right in parts:
            tokens = right[...]
            product = jnp.dot(left(), tokens, preferred_element_type=total.dtype)
            total = total + product
        return total

    monkeypatch.setattr(gpu_products, "accumulate", accumulate)


@pytest.mark.parametrize("x_dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float16])
def test_programs_have_as_many_tokens_as_the_tensor_core_takes(x_dtype):
    """PTX ISA, wgmma: N is a multiple of 8; of integers, of 16 or 24 or less."""
    takes = {8, 16, 24, 32, 48, 64} | (set() if x_dtype == jnp.int8 else {40, 56})
    for rows in range(1, 201):
        tokens = plan(Problem(rows, 4096, 4096, 8, x_dtype, 0)).tokens
        assert tokens in takes
        programs = -(-rows // tokens)
        assert not any(-(-rows // less) == programs for less in takes if less < tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [None, 128])
def test_copies_overlap_with_products(name, group):
    bits, groups = FORMATS[name].numbers.bits, 0 if group is None else 2
    own = jnp.int8 if name.startswith("int") else jnp.float8_e4m3fn
    all_rows = (*range(1, 66, 8), *range(8, 65, 8), 100, 129, 4096)
    sizes = ((256, 128), (4096, 4096), (8192, 28672))
    for rows, size, x_dtype in itertools.product(all_rows, sizes, (own, jnp.float16)):
        assert plan(Problem(rows, *size, bits, x_dtype, groups)).stages >= 2


# (rows, K, N), and what is special.
PRODUCTS = {
    "int8": ("int8", (5, 512, 128), {}),
    "int4 odd sizes": ("int4", (3, 300, 130), {}),
    "int4 group 512": ("int4", (9, 1024, 256), {"group": 512}),
    "int4 group 128 zero points": (
        "int4",
        (8, 256, 128),
        {"group": 128, "symmetric": False},
    ),
    "fp8_e4m3": ("fp8_e4m3", (8, 256, 128), {}),
    "fp6_e3m2, many tokens": ("fp6_e3m2", (130, 256, 128), {}),
    "fp6_e2m3 group 128": ("fp6_e2m3", (8, 512, 128), {"group": 128}),
}


def tokens(rows, depth, dtype=jnp.bfloat16):
    """Sizes that differ widely between tokens and within them."""
    random = np.random.default_rng(1)
    x = random.normal(size=(rows, depth)) * 2.0 ** random.integers(
        -30, 9, (rows, depth)
    )
    return jnp.asarray(x * 2.0 ** random.integers(-60, 60, (rows, 1)), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_halves_are_the_tokens_up_to_the_largest(dtype):
    limits = jnp.finfo(dtype)
    random = np.random.default_rng(0)
    sizes = [limits.max, 1.0, 1e4 * limits.tiny]
    x = random.uniform(-1, 1, (3, 256)) * np.asarray(sizes, np.float64)[:, None]
    x[:, 0] = sizes
    x[0, 1] = 1.0
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    codes, scales, pieces = gpu.halves(jnp.asarray(x, jnp.float32), jnp.dtype(dtype))
    assert (codes.dtype, pieces) == (jnp.float16, 2 if dtype == "float32" else 1)
    found = np.asarray(codes, np.float64).reshape(pieces, *x.shape).sum(axis=0)
    lost = np.abs(found * np.asarray(scales, np.float64) - x)
    exact = 2.0**-23 * np.abs(x) if dtype == "float32" else 0.0
    assert (lost <= 2.0**-39 * np.abs(x).max(axis=1, keepdims=True) + exact).all()


def assert_near(out, x, w):
    """Within 2 units of the last place, and the error of a float32 sum."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    w = np.asarray(dequantize(w, jnp.float32), np.float64)
    exact, size = x @ w, np.abs(x) @ np.abs(w)
    unit = 2 * np.abs(exact) * float(jnp.finfo(out.dtype).eps)
    error = np.abs(np.asarray(out.astype(jnp.float32), np.float64) - exact)
    assert (error <= unit + 1e-6 * np.sqrt(len(w)) * size).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_exact_but_for_the_sum(name, interpreted):
    format, (rows, depth, columns), given = PRODUCTS[name]
    w, x = weight(format, (depth, columns), **given), tokens(rows, depth)
    run = jax.jit(functools.partial(quant_matmul, implementation="gpu"))
    assert_near(run(x, arrange_for_gpu(w)), x, w)


def test_tokens_of_32_bits(interpreted):
    w, x = weight("fp6_e2m3", (256, 128)), tokens(4, 256, jnp.float32)
    out = jax.jit(functools.partial(quant_matmul, implementation="gpu"))(
        x, arrange_for_gpu(w)
    )
    assert out.dtype == x.dtype
    assert_near(out, x, w)


def test_a_token_that_is_not_finite_is_alone(interpreted):
    w, x = weight("fp6_e3m2", (256, 128)), tokens(3, 256)
    x = x.at[1, 7].set(jnp.nan)
    out = quant_matmul(x, arrange_for_gpu(w), implementation="gpu")
    assert jnp.isnan(out[1]).all() and jnp.isfinite(out[0::2]).all()


@pytest.mark.parametrize(
    "name, group",
    [("int8", None), ("int4", 128), ("fp6_e2m3", None), ("fp6_e3m2", 128)],
)
def test_products_with_8_bit_tokens_are_those_of_the_reference(
    name, group, interpreted
):
    w, x = weight(name, (512, 128), group=group), tokens(8, 512, jnp.float32)
    out = w8a8_matmul(x, arrange_for_gpu(w), jnp.float32, implementation="gpu")
    want = w8a8_matmul(x, w, jnp.float32, implementation="reference")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_one_of_a_stack_in_a_scan(interpreted):
    w, x = weight("int4", (3, 256, 256)), tokens(8, 256)
    x = x / jnp.abs(x).max(axis=1, keepdims=True)

    def through(x, w, implementation):
        def layer(x, i):
            return quant_matmul(x, w, layer=i, implementation=implementation), None

        return jax.lax.scan(layer, x, jnp.arange(3))[0]

    out = through(x, arrange_for_gpu(w), "gpu").astype(jnp.float32)
    want = through(x, w, "reference").astype(jnp.float32)
    np.testing.assert_allclose(out, want, atol=2e-2 * np.abs(want).max())


Q = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)


def kernels(kind, function, *arguments):
    """How many there are in a program for CUDA devices of this kind."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = (
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        )
    return lowered.as_text().count("@mosaic_gpu")


@pytest.mark.parametrize("multiply", [quant_matmul, w8a8_matmul])
def test_arranged_weights_get_the_kernel_on_hopper_gpus(multiply):
    w = weight("int4")
    arranged = arrange_for_gpu(w)
    assert kernels("NVIDIA H200", multiply, Q, arranged) == 1
    assert kernels("NVIDIA H200", multiply, Q, w) == 0
    assert kernels("NVIDIA B200", multiply, Q, arranged) == 0


def test_what_cannot_run_says_why():
    w = weight("int8")
    with pytest.raises(ValueError, match=r"'gpu' cannot run here.*`arrange_for_gpu`"):
        quant_matmul(jnp.zeros((4, 512)), w, implementation="gpu")
    with pytest.raises(ValueError, match="mxfp4 has scales of 32 rows"):
        arrange_for_gpu(weight("mxfp4"))


@pytest.mark.parametrize(
    "use",
    [
        dequantize,
        to_two_planes,
        functools.partial(to_arrays, prefix="w"),
        lambda w: grouped_matmul(jnp.zeros((4, 512)), w, jnp.asarray([4], jnp.int32)),
    ],
)
def test_what_takes_no_arranged_weights_says_so(use):
    with pytest.raises(TypeError, match=r"is a? ?GpuTensor.*`arrange_from_gpu`"):
        use(arrange_for_gpu(weight("fp6_e3m2", (1, 512, 128))))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_other_implementations_take_arranged_weights(implementation):
    w, x = weight("fp6_e2m3"), tokens(4, 512)
    run = functools.partial(quant_matmul, x, implementation=implementation)
    np.testing.assert_array_equal(run(arrange_for_gpu(w)), run(w))


def test_shards_of_arranged_weights_are_arranged():
    w, x = weight("fp6_e2m3", (512, 256)), tokens(4, 512, jnp.float32)
    arranged = arrange_for_gpu(w)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "columns"))
    specs = partition_specs(arranged, P("rows", "columns"), mesh.shape)
    assert specs.words == P("columns", "rows", None, None)

    def run(x, w):
        return jax.lax.psum(quant_matmul(x, w, implementation="xla"), "rows")

    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(None, "rows"), specs), out_specs=P(None, "columns")
    )
    want = quant_matmul(x, w, implementation="xla")
    error = np.abs(run(x, arranged) - want).max(axis=1)
    assert (error <= 1e-5 * np.abs(want).max(axis=1)).all()


def test_gradients_of_arranged_weights_are_those_of_the_others():
    w, x = weight("int4", group=128), tokens(4, 512, jnp.float32)

    def total(x, w):
        return quant_matmul(x, w, implementation="xla").sum()

    gradient = jax.grad(total)
    np.testing.assert_array_equal(gradient(x, arrange_for_gpu(w)), gradient(x, w))
