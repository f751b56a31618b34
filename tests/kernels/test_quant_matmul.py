"""Products with quantized weights: every implementation, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.quant_matmul import (
    FORMATS,
    QuantizedTensor,
    dequantize,
    partition_specs,
    planner,
    quant_matmul,
    quantize,
    tpu,
)
from kernels_pallas.quant_matmul.chips import TPU7X, UNKNOWN, V5E, V5P, V6E
from kernels_pallas.quant_matmul.planner import Plan, Problem

# (format, options): every layout, every way to scale.
WEIGHTS = {
    **{name: (name, {}) for name in FORMATS},
    "int4 group 128": ("int4", {"group": 128}),
    "int4 group 512": ("int4", {"group": 512}),
    "fp6_e3m2 group 256": ("fp6_e3m2", {"group": 256}),
    "int8 zero points": ("int8", {"symmetric": False}),
    "int4 group 128 zero points": ("int4", {"group": 128, "symmetric": False}),
}
DTYPES = ["float32", "bfloat16", "float16"]
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, one grid step after the other."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of every dim, the last of M and N not whole."""

    def plan(problem, chip):
        depth = 512 if problem.depth % 512 == 0 else 256
        depth = depth if problem.group is None else max(depth, problem.group)
        dot, scales_weights = planner.dot_of(problem.rows, depth, problem.group)
        whole_x = problem.rows % 2 == 0
        return Plan(16, depth, 128, whole_x, dot, scales_weights)

    monkeypatch.setattr(planner, "plan", plan)


def arrays(rows, depth, columns, dtype="bfloat16", seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, depth)) * np.exp(random.normal(size=(rows, 1)))
    w = random.normal(size=(depth, columns)) * np.exp(random.normal(size=columns))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32)


def assert_close(got, x, w, out_dtype):
    """Within 2 ulp of the result and 1e-6 sqrt(K) |x| |w| of the sum in float64."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    w = np.asarray(dequantize(w, jnp.float32), np.float64)
    want = x @ w
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0)[None]
    ulp = ULP[out_dtype] * np.exp2(np.floor(np.log2(np.abs(want))))
    bound = 2 * ulp + 1e-6 * np.sqrt(x.shape[1]) * norms
    error = np.abs(np.asarray(got.astype(jnp.float32), np.float64) - want)
    worst = (error / bound).max()
    assert worst <= 1, f"error is {worst:.2f} of what is allowed"


def both_shapes(name, implementation, out_dtype="bfloat16"):
    format, options = WEIGHTS[name]
    for shape in ((5, 500, 200), (40, 1024, 300)):
        x, w = arrays(*shape)
        w = quantize(w, format, **options)
        got = quant_matmul(x, w, out_dtype, implementation)
        assert got.shape == (shape[0], shape[2]) and got.dtype == out_dtype
        assert_close(got, x, w, out_dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_plain_jax_is_the_product(name, implementation):
    both_shapes(name, implementation, "float32")


@pytest.mark.parametrize("name", WEIGHTS)
def test_tpu_kernel_is_the_product(name, interpreted, small_blocks):
    both_shapes(name, "tpu", "float32")


@pytest.mark.parametrize("name", ["int4", "fp6_e3m2", "mxfp4", "int4 group 128"])
def test_tpu_kernel_with_its_own_plan(name, interpreted):
    both_shapes(name, "tpu")


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize(
    "dtype, out_dtype",
    [
        *zip(DTYPES, DTYPES, strict=True),
        ("bfloat16", "float32"),
        ("float32", "float16"),
    ],
)
def test_dtypes(dtype, out_dtype, implementation, interpreted):
    x, w = arrays(9, 500, 130, dtype)
    w = quantize(w, "fp6_e2m3")
    got = quant_matmul(x, w, out_dtype, implementation)
    assert got.dtype == out_dtype
    assert_close(got, x, w, out_dtype)
    assert quant_matmul(x, w, implementation=implementation).dtype == x.dtype


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_multiplied_exactly(name, implementation, interpreted):
    """The identity times a matrix of every code, scale 1, gives their numbers."""
    kind = FORMATS[name]
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**kind.numbers.bits, (256, 128), dtype=np.uint8)
    numbers = np.asarray(kind.numbers.decode(jnp.asarray(codes)))
    native = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
    if name in native:
        codes = np.where(np.isfinite(codes.view(native[name])), codes, 0)
        codes = codes.astype(np.uint8)
        numbers = codes.view(native[name]).astype(np.float32)
    scales = jnp.ones((1 if kind.group is None else 256 // kind.group, 128))
    tensor_scale = jnp.ones((1, 1)) if kind.scaling.per_tensor else None
    w = QuantizedTensor(
        kind.pack(jnp.asarray(codes)),
        scales.astype(kind.scaling.dtype),
        None,
        tensor_scale,
        name,
        kind.group,
        (0, 0),
        jnp.dtype(jnp.float32),
    )
    x = jnp.eye(256, dtype=jnp.bfloat16)
    got = quant_matmul(x, w, jnp.float32, implementation)
    np.testing.assert_array_equal(got, numbers)


@pytest.mark.parametrize("chip", [V5E, TPU7X], ids=["v5e", "tpu7x"])
@pytest.mark.parametrize("name", ["fp6_e2m3", "fp8_e4m3"])
def test_e4m3_as_each_chip_reads_it(name, chip, interpreted, monkeypatch):
    monkeypatch.setattr(tpu, "chip_of", lambda x: chip)
    x, w = arrays(5, 300, 130)
    w = quantize(w, name)
    assert_close(quant_matmul(x, w, jnp.float32, "tpu"), x, w, "float32")


@pytest.mark.parametrize("detect_races", [False, True])
@pytest.mark.parametrize("name", ["fp6_e3m2", "nvfp4"])
def test_tpu_kernel_reads_nothing_unwritten(name, detect_races, small_blocks):
    """In this interpreter memory is NaN until something was written there."""
    x, w = arrays(20, 512, 200)
    w = quantize(w, name)
    parameters = pltpu.InterpretParams(detect_races=detect_races)
    with pltpu.force_tpu_interpret_mode(parameters):
        got = quant_matmul(x, w, jnp.float32, "tpu")
    assert_close(got, x, w, "float32")


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("name", ["int4 group 128 zero points", "fp6_e3m2"])
def test_gradient_is_the_reference_s(name, implementation, interpreted):
    format, options = WEIGHTS[name]
    x, w = arrays(5, 300, 130, "float32")
    w = quantize(w, format, **options)
    mixture = jnp.asarray(np.random.default_rng(1).normal(size=(5, 130)), jnp.float32)

    def loss(x):
        return (quant_matmul(x, w, implementation=implementation) * mixture).sum()

    want = mixture @ dequantize(w).T
    np.testing.assert_allclose(jax.grad(loss)(x), want, rtol=1e-5, atol=1e-4)
    # With a result of another dtype than x.
    got = jax.grad(lambda x: quant_matmul(x, w, jnp.float32, implementation).sum())(
        x.astype(jnp.bfloat16)
    )
    want = dequantize(w).sum(axis=1)
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()
    assert error < 2e-2


def test_weights_are_constants():
    x, w = arrays(5, 256, 128, "float32")
    w = quantize(w, "fp8_e4m3")

    def loss(x, scales):
        scaled = QuantizedTensor(w.data, scales, None, None, *_static(w))
        return quant_matmul(x, scaled).sum()

    gradient = jax.grad(loss, argnums=1)(x, w.scales)
    assert not gradient.any()


def _static(w):
    return w.format_name, w.group, w.padding, w.dtype


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("name", ["int4 group 128", "fp6_e3m2"])
def test_transformations(name, implementation, interpreted):
    """jit, vmap over x, vmap and scan over a stack of weights."""
    format, options = WEIGHTS[name]
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 3, 256)), jnp.float32)
    w = quantize(jnp.asarray(random.normal(size=(2, 256, 256)), jnp.float32), format)
    w = w if not options else quantize(dequantize(w), format, **options)
    run = functools.partial(quant_matmul, implementation=implementation)
    whole = np.asarray(dequantize(w))
    first = jax.tree.map(lambda each: each[0], w)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(jax.jit(run)(x, first), x @ whole[0])
    close(jax.vmap(run, in_axes=(0, None))(x, first), x @ whole[0])
    close(jax.vmap(run)(x, w), np.einsum("bmk,bkn->bmn", x, whole))
    chained, _ = jax.lax.scan(lambda x, w: (run(x, w), None), x, w)
    np.testing.assert_allclose(chained, x @ whole[0] @ whole[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("name", ["int4 group 128", "nvfp4"])
def test_shards(name, implementation, interpreted):
    """K over one axis, N over another; values and the gradient of x."""
    format, options = WEIGHTS[name]
    x, w = arrays(4, 1024, 256, "float32")
    w = quantize(w, format, **options)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    specs = partition_specs(w, P("rows", "columns"), mesh.shape)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "rows"), specs),
        out_specs=P(None, "columns"),
        # The interpreter combines the layer, which varies, with grid indices.
        check_vma=implementation != "tpu",
    )
    def run(x, w):
        return jax.lax.psum(quant_matmul(x, w, None, implementation), "rows")

    want = x @ dequantize(w)
    np.testing.assert_allclose(run(x, w), want, rtol=1e-4, atol=1e-3)
    gradient = jax.jit(jax.grad(lambda x: run(x, w).sum()))(x)
    want = jnp.broadcast_to(dequantize(w).sum(axis=1), x.shape)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("name", ["int4 group 128 zero points", "fp6_e3m2", "nvfp4"])
def test_one_layer_of_a_stack(name, implementation, interpreted):
    format, options = WEIGHTS[name]
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, 256)), jnp.float32)
    w = jnp.asarray(random.normal(size=(3, 256, 256)) / 16, jnp.float32)
    w = quantize(w, format, **options)
    run = functools.partial(quant_matmul, implementation=implementation)

    @jax.jit
    def through(x):
        layers = jnp.arange(3)
        return jax.lax.scan(lambda x, i: (run(x, w, layer=i), None), x, layers)[0]

    a, b, c = np.asarray(dequantize(w))
    np.testing.assert_allclose(through(x), x @ a @ b @ c, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(x, w, layer=2), x @ c, rtol=1e-5, atol=1e-4)
    gradient = jax.grad(lambda x: run(x, w, layer=1).sum())(x)
    want = np.broadcast_to(b.sum(axis=1), x.shape)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-4)


def test_any_leading_dims():
    x, w = arrays(6, 256, 128)
    w = quantize(w, "int8")
    whole = quant_matmul(x, w)
    np.testing.assert_array_equal(quant_matmul(x.reshape(2, 3, 256), w)[1, 2], whole[5])
    assert quant_matmul(x[0], w).shape == (128,)
    assert quant_matmul(x[:0], w).shape == (0, 128)


def test_infinite_activations_stay_in_their_row(interpreted):
    x, w = arrays(4, 256, 128, "float32")
    w = quantize(w, "int8")
    got = quant_matmul(x.at[1, 7].set(jnp.inf), w, implementation="tpu")
    assert np.isfinite(np.asarray(got)[[0, 2, 3]]).all()
    sign = np.sign(np.asarray(dequantize(w))[7])
    np.testing.assert_array_equal(
        np.asarray(got)[1][sign != 0], (sign * np.inf)[sign != 0]
    )


def test_cost_is_that_of_the_packed_weights():
    x, w = arrays(16, 1024, 256)
    w = quantize(w, "fp6_e3m2")
    run = functools.partial(quant_matmul, implementation="tpu")
    text = str(jax.make_jaxpr(run)(x, w))
    assert f"flops={2 * 16 * 1024 * 256}" in text
    assert f"bytes_accessed={x.nbytes + w.nbytes + 16 * 256 * 2}" in text
    assert w.nbytes == 1024 * 256 * 3 // 4 + 256 * 4


def test_lowers_for_a_tpu_everywhere():
    x, w = arrays(16, 300, 130)
    w = quantize(w, "fp6_e3m2")
    lowered = jax.jit(quant_matmul).trace(x, w).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
    lowered = jax.jit(quant_matmul).trace(x, w).lower(lowering_platforms=("cuda",))
    assert "tpu_custom_call" not in lowered.as_text()


@pytest.mark.parametrize("chip", [V5E, V5P, V6E, TPU7X, UNKNOWN])
def test_plans_cover_and_fit(chip):
    shapes = ((256, 128), (4096, 14336), (11008, 4096), (53248, 16384))
    scales = ((None, 6), (128, 4.25), (16, 4.5), (None, 8))
    for rows, (depth, columns), (group, bits) in itertools.product(
        (1, 16, 100, 128, 300, 4096), shapes, scales
    ):
        problem = Problem(rows, depth, columns, bits, group, 2)
        plan = planner.plan(problem, chip)
        assert depth % plan.depth == 0 and plan.depth % (group or 256) == 0
        assert plan.rows == rows or plan.rows % 16 == 0
        assert plan.columns % 128 == 0
        x, weights = 2 * plan.rows * plan.depth, plan.depth * plan.columns * bits / 8
        assert 2 * (x + weights) < chip.vmem < chip.vmem_limit


def test_plans_keep_the_memory_busy():
    """At few rows the modelled time is near that of reading the weights."""
    for chip in (V5E, V5P, V6E, TPU7X):
        for depth, columns in ((4096, 14336), (14336, 4096), (8192, 8192)):
            problem = Problem(16, depth, columns, 6, None, 2)
            plan = planner.plan(problem, chip)
            seconds = planner.seconds(problem, plan, chip)
            assert seconds < 1.15 * depth * columns * 0.75 / chip.bandwidth


def test_mistakes_are_explained():
    x, w = arrays(4, 256, 128)
    q = quantize(w, "int8")
    with pytest.raises(ValueError, match=r"x \(4, 255\) and w \(256, 128\)"):
        quant_matmul(x[:, 1:], q)
    with pytest.raises(ValueError, match="layer=None; give one matrix"):
        quant_matmul(x, quantize(w[None], "int8"))
    with pytest.raises(ValueError, match="layer=1; give one matrix"):
        quant_matmul(x, q, layer=1)
    with pytest.raises(TypeError, match="what `quantize` returns"):
        quant_matmul(x, w)
    with pytest.raises(TypeError, match="x is int32"):
        quant_matmul(x.astype(jnp.int32), q)
    with pytest.raises(TypeError, match="out_dtype is int8"):
        quant_matmul(x, q, jnp.int8)
    with pytest.raises(ValueError, match="choose one of"):
        quant_matmul(x, q, implementation="cuda")
