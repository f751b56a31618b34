"""Storage formats: every code, rounding, packing, files, shards."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.quant_matmul import (
    FORMATS,
    QuantizedTensor,
    TwoPlanes,
    dequantize,
    from_arrays,
    from_two_planes,
    partition_specs,
    quantize,
    to_arrays,
    to_two_planes,
)

NUMPY = {
    "int8": np.int8,
    "int4": ml_dtypes.int4,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
FLOATS = [name for name in FORMATS if not name.startswith("int")]


def all_codes(name):
    """Every code of a format that is a number, and its number by ml_dtypes."""
    codes = np.arange(2 ** FORMATS[name].numbers.bits, dtype=np.uint8)
    stored = codes.view(np.int8) if name == "int8" else codes
    if name == "int4":
        numbers = codes.view(np.int8).astype(np.float32)
        numbers = np.where(numbers > 7, numbers - 16, numbers)
    else:
        numbers = stored.view(NUMPY[name]).astype(np.float32)
    finite = np.isfinite(numbers)
    return codes[finite], numbers[finite]


def weights(shape=(512, 256), seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    columns = np.exp(random.normal(size=shape[-1]))
    return jnp.asarray(random.normal(size=shape) * columns, dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_means_its_number(name):
    codes, numbers = all_codes(name)
    np.testing.assert_array_equal(
        FORMATS[name].numbers.decode(jnp.asarray(codes)), numbers
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_survives_packing(name):
    """Codes at every place of a block, decoded by the words that kernels decode."""
    codes, numbers = all_codes(name)
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(codes), (2, 512, 128))
    chosen[0].flat[: len(codes)] = np.arange(len(codes))
    kind = FORMATS[name]
    data = kind.pack(jnp.asarray(codes[chosen]))
    assert data.shape == (2, *kind.layout.data_shape(512, 128))
    np.testing.assert_array_equal(kind.values(data), numbers[chosen])
    back = kind.numbers.decode(kind.unpack(data))
    np.testing.assert_array_equal(back, numbers[chosen])


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_at_every_place_of_a_word(name):
    """All pairs of a code and a row modulo 256, with random neighbours."""
    codes, numbers = all_codes(name)
    rows = np.arange(256)[:, None]
    chosen = (rows * 7 + np.arange(256)[None]) % len(codes)
    kind = FORMATS[name]
    np.testing.assert_array_equal(
        kind.values(kind.pack(jnp.asarray(codes[chosen]))), numbers[chosen]
    )


@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_a_weight(name):
    q = quantize(weights((1024, 256)), name)
    data = q.nbytes - sum(x.nbytes for x in (q.scales, q.tensor_scale) if x is not None)
    assert data * 8 == FORMATS[name].numbers.bits * 1024 * 256


@pytest.mark.parametrize("name", FLOATS)
def test_rounds_to_nearest_even_and_saturates(name):
    kind, dtype = FORMATS[name].numbers, NUMPY[name]
    _, numbers = all_codes(name)
    numbers = np.unique(np.abs(numbers))
    halfway = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    below, above = (np.nextafter(halfway, np.float32(x)) for x in (0, np.inf))
    random = np.random.default_rng(0)
    spread = np.exp2(random.uniform(-30, 15, 4048)).astype(np.float32)
    x = np.concatenate([numbers, halfway, below, above, spread])
    x = np.resize(np.concatenate([x, -x]), 9000)  # one compilation for all formats
    x = np.clip(x, -kind.largest, kind.largest)
    want = x.astype(dtype).astype(np.float32)
    nearest = jax.jit(lambda x: kind.decode(kind.encode(x)))
    np.testing.assert_array_equal(nearest(jnp.asarray(x)), want)
    beyond = jnp.asarray([1e9, jnp.inf, -1e30, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(
        nearest(beyond), kind.largest * np.asarray([1, 1, -1, -1])
    )


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_round_to_even_and_saturate(name):
    kind = FORMATS[name].numbers
    x = jnp.asarray([0.5, 1.5, -0.5, -2.5, 2.4, 300.0, -300.0])
    want = [0, 2, 0, -2, 2, kind.largest, kind.smallest]
    np.testing.assert_array_equal(kind.decode(kind.encode(x)), want)


@pytest.mark.parametrize("name", ["int8", "int4", "fp6_e3m2", "fp8_e4m3"])
@pytest.mark.parametrize("group", [None, 128, 256])
def test_error_is_half_a_step(name, group):
    w = weights((500, 200))
    q = quantize(w, name, group=group)
    kind = FORMATS[name]
    got = np.asarray(dequantize(q))
    scales = np.repeat(np.asarray(q.scales), group or q.padded[0], axis=-2)[:500, :200]
    # The widest step of a format is the one below its largest number.
    numbers = np.unique(np.abs(all_codes(name)[1]))
    widest = np.diff(numbers[numbers <= kind.numbers.largest]).max()
    error = np.abs(got - np.asarray(w))
    assert (error <= scales * widest * (0.5 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("group", [None, 128])
def test_zero_points_use_all_codes(name, group):
    w = weights((512, 128)) + 3.0
    q = quantize(w, name, group=group, symmetric=False)
    np.testing.assert_array_equal(q.zeros, np.round(q.zeros))
    levels = 2 ** FORMATS[name].numbers.bits - 1
    grouped = np.asarray(w).reshape(-1, group or 512, 128)
    span = np.maximum(grouped.max(1), 0) - np.minimum(grouped.min(1), 0)
    np.testing.assert_allclose(q.scales, span / levels, rtol=1e-6)
    error = np.abs(np.asarray(dequantize(q)).reshape(grouped.shape) - grouped)
    assert (error <= np.asarray(q.scales)[:, None] * (1 + 1e-5)).all()
    symmetric = quantize(w, name, group=group)
    plain = np.abs(np.asarray(dequantize(symmetric)).reshape(grouped.shape) - grouped)
    assert (error**2).mean() < (plain**2).mean()


def test_mxfp4_is_the_microscaling_specification():
    w = np.asarray(weights((256, 128)))
    q = quantize(jnp.asarray(w), "mxfp4")
    grouped = w.reshape(8, 32, 128)
    scale = np.exp2(np.floor(np.log2(np.abs(grouped).max(1, keepdims=True))) - 2)
    numbers = np.clip(grouped / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    want = (numbers.astype(np.float32) * scale).reshape(w.shape)
    np.testing.assert_array_equal(dequantize(q), want)
    assert q.nbytes * 8 == 256 * 128 * 4.25


def test_nvfp4_has_two_levels_of_scales():
    w = np.asarray(weights((256, 128)))
    q = quantize(jnp.asarray(w), "nvfp4")
    tensor = np.abs(w).max() / np.float32(6 * 448)
    np.testing.assert_allclose(np.asarray(q.tensor_scale), tensor, rtol=1e-6)
    assert float(q.scales.astype(jnp.float32).max()) == 448
    grouped = w.reshape(16, 16, 128)
    scale = np.abs(grouped).max(1, keepdims=True) / np.float32(6) / tensor
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor
    numbers = np.clip(grouped / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    want = (numbers.astype(np.float32) * scale).reshape(w.shape)
    np.testing.assert_allclose(dequantize(q), want, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_and_tiny_columns(name):
    w = weights((256, 128)).at[:, 3].set(0).at[:, 5].set(1e-42)
    got = np.asarray(dequantize(quantize(w, name)))
    assert np.isfinite(got).all() and (got[:, 3] == 0).all() and (got[:, 5] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_again_changes_nothing(name):
    once = dequantize(quantize(weights((256, 128)), name))
    np.testing.assert_allclose(dequantize(quantize(once, name)), once, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_or_stays_so(bad):
    w = weights((256, 128)).at[7, 9].set(bad)
    with pytest.raises(ValueError, match=r"1 of the weights .* at \(7, 9\)"):
        quantize(w, "fp6_e3m2")
    for name in FORMATS:
        traced = dequantize(jax.jit(lambda w, name=name: quantize(w, name))(w))
        assert not np.isfinite(np.asarray(traced)[7, 9]), name
        if not FORMATS[name].scaling.per_tensor:
            assert np.isfinite(np.asarray(traced)[:, :9]).all(), name


def test_mistakes_are_explained():
    w = weights((256, 128))
    with pytest.raises(ValueError, match="choose one of"):
        quantize(w, "fp7")
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize(w, "int4", group=100)
    with pytest.raises(ValueError, match="scales of 32 rows"):
        quantize(w, "mxfp4", group=128)
    with pytest.raises(ValueError, match="only int8 and int4"):
        quantize(w, "fp6_e3m2", symmetric=False)
    with pytest.raises(ValueError, match=r"\[..., K, N\]"):
        quantize(w[0], "int8")
    with pytest.raises(TypeError, match="int32"):
        quantize(w.astype(jnp.int32), "int8")


@pytest.mark.parametrize("name", FORMATS)
def test_stack_of_layers_scans_and_keeps_its_shape(name):
    w = weights((3, 300, 130), dtype=jnp.bfloat16)
    q = quantize(w, name)
    assert q.shape == (3, 300, 130) and q.dtype == jnp.bfloat16 and q.ndim == 3
    whole = dequantize(q)
    assert whole.shape == w.shape and whole.dtype == jnp.bfloat16

    def layer(carry, each):
        assert each.shape == (300, 130)
        return carry, dequantize(each)

    _, stacked = jax.lax.scan(layer, 0, q)
    np.testing.assert_array_equal(stacked, whole)
    np.testing.assert_array_equal(jax.vmap(dequantize)(q), whole)
    alone = dequantize(quantize(w[1], name))
    np.testing.assert_array_equal(alone, whole[1])


@pytest.mark.parametrize(
    "name, symmetric",
    [*((name, True) for name in FORMATS), ("int8", False), ("int4", False)],
)
def test_files_give_the_same_weight(name, symmetric, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    w = weights((2, 300, 130), dtype=jnp.bfloat16)
    q = quantize(w, name, symmetric=symmetric)
    arrays, metadata = to_arrays(q, "layers.wq")
    assert {x.dtype for x in arrays.values()} <= {np.dtype("uint8"), np.dtype("f4")}
    assert abs(sum(x.nbytes for x in arrays.values()) - q.nbytes) <= 1
    save_file(arrays, tmp_path / "w.safetensors", metadata)
    with safe_open(tmp_path / "w.safetensors", "numpy") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}
        back = from_arrays(found, file.metadata(), "layers.wq")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8)
        )


def test_damaged_files_are_refused():
    arrays, metadata = to_arrays(quantize(weights((256, 128)), "int4", group=128), "w")
    with pytest.raises(ValueError, match="no metadata of 'v'"):
        from_arrays(arrays, metadata, "v")
    with pytest.raises(ValueError, match="should be JSON"):
        from_arrays(arrays, {"w": "{}"}, "w")
    with pytest.raises(ValueError, match=r"w\.scales.*missing"):
        from_arrays({"w.data": arrays["w.data"]}, metadata, "w")
    with pytest.raises(ValueError, match=r"w\.scales \(1, 128\) should be \(2, 128\)"):
        from_arrays({**arrays, "w.scales": arrays["w.scales"][:1]}, metadata, "w")
    with pytest.raises(ValueError, match=r"w\.data .* is no int4 data"):
        from_arrays({**arrays, "w.data": arrays["w.data"][:100]}, metadata, "w")


@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_quantized_tensors(name):
    q = quantize(weights((1024, 256)), name)
    specs = partition_specs(q, P("rows", "columns"), {"rows": 4, "columns": 2})
    assert jax.tree.structure(specs) == jax.tree.structure(q)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))

    def check(shard):
        assert shard.shape == (256, 128)
        return dequantize(shard)

    run = jax.shard_map(
        check, mesh=mesh, in_specs=(specs,), out_specs=P("rows", "columns")
    )
    np.testing.assert_array_equal(run(q), dequantize(q))


def test_stacked_shards():
    q = quantize(weights((4, 256, 128)), "nvfp4")
    specs = partition_specs(q, P("layers"), {"layers": 2})
    assert specs.data == P("layers", None, None, None, None)
    assert specs.tensor_scale == P("layers", None, None)


def test_what_cannot_be_split_says_why():
    sizes = {"tensor": 4, "data": 3}
    q = quantize(weights((512, 256)), "fp6_e3m2")
    with pytest.raises(ValueError, match=r"K=512 .* blocks of 256 .* 4 .*: \[1, 2\]"):
        partition_specs(q, P("tensor"), sizes)
    with pytest.raises(ValueError, match=r"N=256 .* blocks of 128 .*: \[1, 2\]"):
        partition_specs(q, P(None, "tensor"), sizes)
    q = quantize(weights((1024, 256)), "int4", group=512)
    with pytest.raises(ValueError, match=r"K=1024 .* blocks of 512"):
        partition_specs(q, P("tensor"), sizes)
    q = quantize(weights((500, 256)), "int8")
    with pytest.raises(ValueError, match="pad the weight to K=1024"):
        partition_specs(q, P("tensor"), sizes)
    q = quantize(weights((4, 256, 128)), "int8")
    with pytest.raises(ValueError, match=r"dim 0 .* is 4; data has 3 devices"):
        partition_specs(q, P("data"), sizes)
    with pytest.raises(ValueError, match="no mesh axis 'model'"):
        partition_specs(q, P("model"), sizes)


def test_two_planes_there_and_back():
    w = weights((2, 300, 130))
    q = quantize(w, "fp6_e3m2")
    planes = to_two_planes(q)
    assert planes.four.shape == (2, 150, 130) and planes.two.shape == (2, 75, 130)
    # The definition, in numpy: code = four bits before two bits.
    rows = np.arange(300)
    four, two = np.asarray(planes.four), np.asarray(planes.two)
    high = (four[:, rows // 2] >> (4 * (rows % 2))[:, None]) & 15
    low = (two[:, rows // 4] >> (2 * (rows % 4))[:, None]) & 3
    codes = (high << 2 | low).astype(np.uint8)
    numbers = codes.view(ml_dtypes.float6_e3m2fn).astype(np.float32)
    scales = np.asarray(planes.scales)[:, None]
    np.testing.assert_array_equal(numbers * scales, dequantize(q))
    back = from_two_planes(planes, jnp.float32)
    np.testing.assert_array_equal(dequantize(back), dequantize(q))


def test_two_planes_take_any_code():
    random = np.random.default_rng(0)
    four = random.integers(0, 256, (128, 128), dtype=np.uint8)
    two = random.integers(0, 256, (64, 128), dtype=np.uint8)
    scales = np.ones(128, np.float32)
    q = from_two_planes(TwoPlanes(four, two, scales))
    again = to_two_planes(q)
    minus_zero = (np.asarray(again.four) != four).mean()
    assert minus_zero < 0.1
    again = from_two_planes(again)
    np.testing.assert_array_equal(dequantize(again), dequantize(q))
    with pytest.raises(ValueError, match=r"\[..., K/2, N\]"):
        from_two_planes(TwoPlanes(four, two[:-1], scales))
    with pytest.raises(ValueError, match="no two planes"):
        to_two_planes(quantize(weights((256, 128)), "fp6_e2m3"))


def test_is_a_pytree_with_static_parts():
    q = quantize(weights((256, 128)), "nvfp4")
    assert len(jax.tree.leaves(q)) == 3
    doubled = jax.tree.map(lambda x: x, q)
    assert isinstance(doubled, QuantizedTensor) and doubled.shape == (256, 128)
    shapes = jax.eval_shape(lambda: quantize(jnp.ones((300, 128)), "fp6_e3m2"))
    assert shapes.shape == (300, 128)
