"""Products with activations of 8 and 4 bits, against float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quant_matmul import (
    dequantize,
    planner,
    quant_matmul,
    quantize,
    tpu,
    w8a8_matmul,
)
from kernels_pallas.quant_matmul.activations import KINDS, quantize_rows
from kernels_pallas.quant_matmul.chips import V6E
from kernels_pallas.quant_matmul.planner import Plan

# (format, options, activations)
CASES = {
    "w8a8": ("int8", {}, None),
    "w8a8 fp8": ("fp8_e4m3", {}, None),
    "w8a8 e5m2": ("fp8_e5m2", {}, None),
    "w6a8": ("fp6_e3m2", {}, None),
    "w6a8 e2m3 groups": ("fp6_e2m3", {"group": 256}, "fp8_e4m3"),
    "w4a8": ("int4", {}, None),
    "w4a8 groups": ("int4", {"group": 128}, "int8"),
    "w4a8 zero points": ("int4", {"group": 256, "symmetric": False}, None),
    "w8a8 zero points": ("int8", {"symmetric": False}, None),
    "w4a4": ("int4", {}, "int4"),
}


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, in several blocks of every dim."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)
    monkeypatch.setattr(planner, "plan", small_plan)


def small_plan(problem, chip):
    dot, scales_weights = planner.dot_of(problem.rows, 256, problem.group)
    return Plan(32, 256, 128, True, dot, scales_weights)


def arrays(name, shape=(40, 500, 200), dtype="float32"):
    random = np.random.default_rng(0)
    rows, depth, columns = shape
    x = random.normal(size=(rows, depth)) * np.exp(random.normal(size=(rows, 1)))
    format, options, _ = CASES[name]
    w = jnp.asarray(random.normal(size=(depth, columns)), jnp.float32)
    return jnp.asarray(x, dtype), quantize(w, format, **options)


def exact(x, w, kind):
    """Quantized tokens times weights in float64, and what rounding allows."""
    rows = quantize_rows(x, kind)
    tokens = np.asarray(rows.values(jnp.float32), np.float64) * np.asarray(rows.scales)
    weights = np.asarray(dequantize(w), np.float64)
    norms = np.linalg.norm(tokens, axis=1)[:, None] * np.linalg.norm(weights, axis=0)
    want = tokens @ weights
    return want, 4 * 2.0**-23 * np.abs(want) + 1e-6 * np.sqrt(x.shape[1]) * norms


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_rounded_to_nearest_even(kind):
    x, _ = arrays("w8a8")
    x = x.at[3].set(0)
    rows = quantize_rows(x, kind)
    largest = KINDS[kind].largest
    absmax = np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    scales = np.asarray(rows.scales)
    np.testing.assert_allclose(
        scales, np.where(absmax == 0, 1, absmax / largest), rtol=3e-7
    )
    ratio = np.asarray(x) / scales
    if kind == "fp8_e4m3":
        want = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        want = np.round(ratio)
    np.testing.assert_array_equal(rows.values(jnp.float32), want)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("name", CASES)
def test_is_the_product_of_what_was_rounded(name, implementation, interpreted):
    x, w = arrays(name)
    format, _, kind = CASES[name]
    got = w8a8_matmul(x, w, None, kind, implementation)
    kind = kind or ("int8" if format.startswith("int") else "fp8_e4m3")
    want, allowed = exact(x, w, kind)
    assert (np.abs(np.asarray(got, np.float64) - want) <= allowed).all()


def test_chips_without_e4m3fn(interpreted, monkeypatch):
    monkeypatch.setattr(tpu, "chip_of", lambda x: V6E)
    x, w = arrays("w8a8 fp8")
    want, allowed = exact(x, w, "fp8_e4m3")
    got = w8a8_matmul(x, w, implementation="tpu")
    assert (np.abs(np.asarray(got, np.float64) - want) <= allowed).all()


def test_tpu_kernel_reads_nothing_unwritten(monkeypatch):
    monkeypatch.setattr(planner, "plan", small_plan)
    x, w = arrays("w8a8", (40, 512, 200))
    want, allowed = exact(x, w, "int8")
    parameters = pltpu.InterpretParams(detect_races=True)
    with pltpu.force_tpu_interpret_mode(parameters):
        got = w8a8_matmul(x, w, implementation="tpu")
    assert (np.abs(np.asarray(got, np.float64) - want) <= allowed).all()


@pytest.mark.parametrize("name, error", [("w8a8", 0.02), ("w4a8", 0.2), ("w4a4", 0.3)])
def test_is_near_the_product_of_the_originals(name, error):
    x, w = arrays(name)
    random = np.random.default_rng(0)
    random.normal(size=(40, 500)), random.normal(size=(40, 1))
    got = w8a8_matmul(x, w, activations=CASES[name][2])
    want = np.asarray(x) @ random.normal(size=(500, 200))
    relative = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert relative < error


def test_gradient_is_straight_through():
    x, w = arrays("w8a8")
    gradient = jax.grad(lambda x: w8a8_matmul(x, w).sum())(x)
    want = jax.grad(lambda x: quant_matmul(x, w).sum())(x)
    np.testing.assert_array_equal(gradient, want)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_under_transformations(implementation, interpreted):
    x, w = arrays("w8a8", (6, 256, 128))
    run = functools.partial(w8a8_matmul, implementation=implementation)
    whole = run(x, w)
    np.testing.assert_allclose(jax.jit(run)(x, w), whole, rtol=1e-6)
    mapped = jax.vmap(run, in_axes=(0, None))(x.reshape(2, 3, 256), w)
    np.testing.assert_allclose(mapped.reshape(6, 128), whole, rtol=1e-6)
    assert run(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    stack = jax.tree.map(lambda each: jnp.stack([each, each]), w)
    np.testing.assert_allclose(run(x, stack, layer=1), whole, rtol=1e-6)
    assert run(x[0], w).shape == (128,) and run(x[:0], w).shape == (0, 128)


def test_a_token_that_is_not_finite_spoils_only_itself():
    x, w = arrays("w8a8", (6, 256, 128))
    got = np.asarray(w8a8_matmul(x.at[2, 5].set(jnp.nan), w))
    assert np.flatnonzero(~np.isfinite(got).all(axis=1)).tolist() == [2]


def test_mistakes_are_explained():
    x, w = arrays("w8a8", (6, 256, 128))
    with pytest.raises(ValueError, match=r"give one of \['int8', 'int4'\]"):
        w8a8_matmul(x, w, activations="fp8_e4m3")
    with pytest.raises(ValueError, match="use `quant_matmul`"):
        w8a8_matmul(x, quantize(dequantize(w), "mxfp4"))
    with pytest.raises(ValueError, match="do not fit"):
        w8a8_matmul(x[:, 1:], w)
    with pytest.raises(ValueError, match="choose one of"):
        w8a8_matmul(x, w, implementation="cuda")
