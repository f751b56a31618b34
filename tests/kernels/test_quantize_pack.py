"""What a packed array says, and that every implementation says the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantize_pack import (
    FORMATS,
    quantize_pack,
    reference,
    tpu,
    unpack_reduce,
)
from kernels_pallas.quantize_pack.format import unit_interval
from kernels_pallas.quantize_pack.reference import numbers_of
from kernels_pallas.quantize_pack.view import View

NARROW = ["bfloat16", "float16"]
BYTES = {"int8": 1, "int4": 0.5, "fp6_e3m2": 0.75, "fp6_e2m3": 0.75}
# Shapes whose rows, columns or both are no whole blocks; natural and flat columns.
SHAPES = [(256, 128), (1000, 130), (2, 500, 257), (1001,), (300, 3), ()]


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, one grid step after the other."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed_by(implementation, x, format, group=64, key=None):
    run = functools.partial(
        quantize_pack, format=format, group=group, implementation=implementation
    )
    return jax.jit(lambda x: run(x, key=key))(x)


def unpacked_by(implementation, packed, format, **options):
    """The array of one packed part."""
    parts = jax.tree.map(lambda x: x[None], packed)
    return unpack_reduce(*parts, format, implementation=implementation, **options)


def half_steps(x, scales, format, group):
    """Half of the distance of the numbers around each number of x [R, N]."""
    numbers, _ = numbers_of(format)
    numbers = numbers.astype(np.float64)
    spread = np.repeat(np.asarray(scales, np.float64), group, axis=1)
    spread = spread.reshape(-1, x.shape[1])[: x.shape[0]]
    value = np.clip(np.asarray(x, np.float64) / spread, numbers[0], numbers[-1])
    above = np.clip(np.searchsorted(numbers, value), 1, len(numbers) - 1)
    return spread * (numbers[above] - numbers[above - 1]) / 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_bytes_are_the_references(format, implementation, interpreted):
    x = normal(300, 130) * jnp.exp(normal(300, 130, seed=1))
    want = packed_by("reference", x, format)
    got = packed_by(implementation, x, format)
    np.testing.assert_array_equal(got.packed, want.packed)
    np.testing.assert_array_equal(got.scales, want.scales)
    twice = packed_by("xla", -2 * x, format)
    parts = [jnp.stack(each) for each in zip(want, twice, strict=True)]
    total = unpack_reduce(*parts, format, implementation=implementation)
    wanted = unpack_reduce(*parts, format, implementation="reference")
    np.testing.assert_allclose(total, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_of_a_format_comes_back(format):
    """In the order of the codes, every one of them, times a power of two."""
    numbers, codes = numbers_of(format)
    column = np.resize(np.roll(numbers, 3), 256) * 2.0**-9
    x = jnp.asarray(np.stack([np.roll(column, i) for i in range(256)], axis=1))
    for implementation in ("reference", "xla"):
        packed = packed_by(implementation, x, format, group=256)
        back = unpacked_by(implementation, packed, format, shape=x.shape)
        np.testing.assert_array_equal(back, x)
    assert packed.packed.dtype == jnp.uint8
    assert packed.packed.nbytes == x.size * BYTES.get(format, 1)
    # All but NaN, infinities, the other zero and the integer without a negative.
    assert len(set(codes.tolist())) == len(codes) >= 2 ** (8 * BYTES.get(format, 1)) - 9


@pytest.mark.parametrize("format", ["int8", "int4", "fp6_e3m2", "fp8_e5m2"])
def test_tpu_brings_every_number_back(format, interpreted):
    numbers, _ = numbers_of(format)
    x = jnp.asarray(np.resize(numbers, (256, 5)) * 2.0**-9)
    packed = packed_by("tpu", x, format, group=256)
    back = unpacked_by("tpu", packed, format)
    want = unpacked_by("reference", packed_by("reference", x, format, 256), format)
    np.testing.assert_array_equal(back, want)


@pytest.mark.parametrize(
    "format, group",
    [*zip(FORMATS, [32, 64, 128, 256, 32, 64], strict=True), ("int8", 256)],
)
def test_error_is_half_a_step_at_most(format, group):
    x = normal(500, 140) * jnp.exp(3 * normal(500, 140, seed=1))
    packed = packed_by("xla", x, format, group=group)
    back = unpacked_by("xla", packed, format, shape=x.shape)
    error = np.abs(np.asarray(back, np.float64) - np.asarray(x, np.float64))
    allowed = half_steps(x, packed.scales, format, group)
    slack = 1e-6 * np.abs(x)
    assert np.all(error <= allowed * (1 + 1e-5) + slack)
    # What is quantized already stays as it is.
    again = packed_by("xla", back, format, group=group)
    np.testing.assert_array_equal(again.packed, packed.packed)


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, "float32") for shape in SHAPES), *(((300, 130), x) for x in NARROW)],
)
def test_any_shape(shape, dtype, interpreted):
    x = normal(*shape, dtype=dtype)
    want = packed_by("reference", x, "int8")
    for implementation in ("xla", "tpu"):
        packed = packed_by(implementation, x, "int8")
        np.testing.assert_array_equal(packed.packed, want.packed)
        back = unpacked_by(implementation, packed, "int8", shape=shape)
        assert back.shape == shape and back.dtype == jnp.float32
        largest = jnp.abs(x).max().astype(jnp.float32)
        assert jnp.abs(back - x.astype(jnp.float32)).max() <= largest / 254 * 1.001


@pytest.mark.parametrize("shape", [*SHAPES, (256, 4096), (4096, 11008), (7,), (130, 7)])
def test_padding_is_an_eighth_or_a_block(shape):
    view = View(shape)
    assert view.rows * view.columns >= view.size
    stored = view.blocks * 256 * view.columns
    assert stored <= max(view.size * 9 / 8, view.size + 256 * 128)
    if not view.flat:
        assert view.columns == shape[-1]


@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_has_no_bias(format):
    """The mean of many is the number, within 5 of its standard errors."""
    x = jnp.tile(normal(256, 16), (1, 1))
    draws = 200
    keys = jax.random.split(jax.random.key(0), draws)

    @jax.jit
    def once(key):
        packed = quantize_pack(x, format, key=key, implementation="xla")
        return unpacked_by("xla", packed, format, shape=x.shape)

    drawn = np.asarray(jax.lax.map(once, keys), np.float64)
    packed = packed_by("xla", View(x.shape).of(x), format, group=256)
    limit = half_steps(np.asarray(View(x.shape).of(x)), packed.scales, format, 256)
    steps = 2 * limit.reshape(x.shape)
    assert np.all(np.abs(drawn - np.asarray(x)) <= steps * 1.0001 + 1e-6)
    error = drawn.mean(axis=0) - np.asarray(x)
    assert np.all(np.abs(error) <= 5 * steps / 2 / np.sqrt(draws) + 1e-6)
    assert abs((error / steps).mean()) <= 5 / 2 / np.sqrt(draws * x.size)


def test_stochastic_rounding_follows_the_key():
    x = normal(256, 128)
    one, same, other = (
        packed_by("xla", x, "int4", key=jax.random.key(i)) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.packed, same.packed)
    assert np.mean(one.packed != other.packed) > 0.1
    np.testing.assert_array_equal(
        packed_by("reference", x, "int4", key=jax.random.key(0)).packed, one.packed
    )


@pytest.mark.parametrize("detect_races", [False, True])
def test_tpu_kernels_read_nothing_unwritten(detect_races, capfd):
    """In this interpreter memory is NaN until something was written there."""
    x = normal(600, 130)
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=detect_races)
    ):
        packed = packed_by("tpu", x, "fp6_e3m2")
        parts = [jnp.stack([each, each]) for each in packed]
        total = unpack_reduce(*parts, "fp6_e3m2", implementation="tpu")
        again = unpack_reduce(
            *parts, "fp6_e3m2", requantize="int8", implementation="tpu"
        )
    want = packed_by("reference", x, "fp6_e3m2")
    np.testing.assert_array_equal(packed.packed, want.packed)
    np.testing.assert_array_equal(total, 2 * unpacked_by("reference", want, "fp6_e3m2"))
    np.testing.assert_array_equal(
        again.packed, packed_by("reference", total, "int8").packed
    )
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("format", ["int4", "fp6_e3m2"])
def test_tpu_stochastic_rounding(format, monkeypatch):
    """As the reference with the same numbers: the interpreter's own are all zero."""

    def uniform(shape):
        place = jax.lax.iota(jnp.int32, math.prod(shape)).reshape(shape)
        return (place * 37 % 251).astype(jnp.float32) / 251

    monkeypatch.setattr(tpu, "_uniform", uniform)
    monkeypatch.setattr(reference, "uniform", lambda _, shape: uniform(shape))
    x, key = normal(256, 128), jax.random.key(3)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = packed_by("tpu", x, format, key=key)
    want = packed_by("reference", x, format, key=key)
    got, want = (unpacked_by("reference", each, format) for each in (got, want))
    np.testing.assert_array_equal(got, want)
    assert np.mean(got != unpacked_by("xla", packed_by("xla", x, format), format)) > 0.1


def test_uniform_numbers_are_below_one():
    bits = jnp.asarray([0, 255, 256, 2**32 - 1], jnp.uint32)
    want = [0, 0, 2.0**-24, 1 - 2.0**-24]
    np.testing.assert_array_equal(unit_interval(bits), want)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "reference"])
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_sum_is_packed_again(format, implementation, interpreted):
    parts = [packed_by("xla", normal(256, 130, seed=i), format) for i in range(3)]
    stacked = [jnp.stack(each) for each in zip(*parts, strict=True)]
    total = unpack_reduce(*stacked, format, implementation=implementation)
    want = sum(unpacked_by("reference", part, format) for part in parts)
    np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6)
    again = unpack_reduce(
        *stacked, format, requantize="int4", implementation=implementation
    )
    want = packed_by("reference", total, "int4")
    np.testing.assert_array_equal(again.packed, want.packed)
    np.testing.assert_allclose(again.scales, want.scales, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_what_is_not_finite_stays_so(bad, implementation, interpreted):
    x = normal(256, 130).at[70, 3].set(bad).at[3, 7].set(0.0)
    for format in ("int8",) if implementation == "tpu" else ("int8", "fp6_e3m2"):
        packed = packed_by(implementation, x, format)
        back = np.array(unpacked_by(implementation, packed, format))
        groups = back.reshape(4, 64, 130)
        assert not np.isfinite(groups[1, :, 3]).any()
        groups[1, :, 3] = 0
        assert np.isfinite(groups).all()


def test_zeros_and_tiny_numbers():
    for x in (jnp.zeros((256, 128)), jnp.full((256, 128), 1e-40)):
        packed = packed_by("xla", x, "int8")
        assert np.all(np.asarray(packed.scales) == 1)
        assert np.all(np.asarray(unpacked_by("xla", packed, "int8")) == 0)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_vmap(implementation, interpreted):
    x = normal(3, 256, 128)
    got = jax.vmap(lambda x: packed_by(implementation, x, "int4"))(x)
    for i in range(3):
        want = packed_by("reference", x[i], "int4")
        np.testing.assert_array_equal(got.packed[i], want.packed)
    back = jax.vmap(lambda p: unpacked_by(implementation, p, "int4"))(got)
    assert back.shape == (3, 256, 128)


def test_a_quantized_reduce_scatter():
    """qgZ on 4 devices: pack, all-to-all, sum and pack again, all-gather."""
    devices = np.array(jax.devices()[:4])
    mesh = Mesh(devices, ("data",))
    x = normal(4, 1024, 128)

    def reduce(x):
        packed = quantize_pack(x[0], "int8")
        assert packed.packed.shape[0] == 4
        exchange = functools.partial(
            jax.lax.all_to_all, axis_name="data", split_axis=0, concat_axis=0
        )
        parts = [exchange(each[:, None]) for each in packed]
        shard = unpack_reduce(*parts, "int8", requantize="int8")
        gather = functools.partial(jax.lax.all_gather, axis_name="data")
        whole = [gather(each).reshape(1, 4, *each.shape[1:]) for each in shard]
        return unpack_reduce(*whole, "int8", shape=(1024, 128))[None]

    run = jax.shard_map(reduce, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(run)(x)
    want = x.sum(axis=0)
    assert np.abs(got - want).max() < 5 * np.abs(x).max() / 127


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_platform_decides_when_lowering(platform):
    def both(x):
        packed = quantize_pack(x, "int8", key=jax.random.key(0))
        return unpack_reduce(*(each[None] for each in packed), "int8")

    lowered = jax.jit(both).trace(normal(300, 200))
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == (2 if platform == "tpu" else 0)


X = jnp.zeros((256, 128))
PACKED, SCALES = jnp.zeros((1, 1, 1, 256, 128), jnp.uint8), jnp.zeros((1, 1, 1, 128))


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        ((X, "int3"), {}, ValueError, "format 'int3'; choose one of"),
        ((X, "int8"), dict(group=100), ValueError, "group=100; choose one of"),
        ((X[:0], "int8"), {}, ValueError, "is empty"),
        ((X.astype(jnp.int32), "int8"), {}, TypeError, "x is int32; give one of"),
        ((X, "int8"), dict(implementation="cuda"), ValueError, "choose one of"),
        ((X, "int8"), dict(implementation="gpu"), ValueError, "no GPU kernel"),
    ],
)
def test_refuses_to_pack(given, options, error, message):
    with pytest.raises(error, match=message):
        quantize_pack(*given, **options)


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        (
            (PACKED, SCALES, "int4"),
            {},
            ValueError,
            r"should be .n, B, 1, 128, N. of int4",
        ),
        ((PACKED[0], SCALES, "int8"), {}, ValueError, "should be .n, B, 1, 256, N."),
        ((PACKED, SCALES[0], "int8"), {}, ValueError, "should be .n, B, G, N."),
        ((PACKED, SCALES[..., :5], "int8"), {}, ValueError, r"scales \(1, 1, 1, 5\)"),
        ((X, SCALES, "int8"), {}, TypeError, "give uint8 and float32"),
        ((PACKED, SCALES, "int8"), dict(shape=(9, 4096)), ValueError, "is not of"),
        (
            (PACKED, SCALES, "int8"),
            dict(shape=(256, 128), requantize="int8"),
            ValueError,
            "has no shape yet",
        ),
    ],
)
def test_refuses_to_unpack(given, options, error, message):
    with pytest.raises(error, match=message):
        unpack_reduce(*given, **options)
