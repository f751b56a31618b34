"""Every implementation of the grouped product is exact, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.grouped_matmul import grouped_matmul, plan, schedule
from kernels_pallas.grouped_matmul.plan import Sizes, Tiles
from kernels_pallas.quant_matmul import dequantize, quantize

# (rows, depth, columns), sizes of the groups, dtype, and tiles if not the planner's.
CASES = {
    "borders_in_tiles": ((300, 96, 130), [0, 129, 0, 150, 0], "float32", None),
    "borders_at_tiles": ((96, 32, 48), [32, 0, 64], "float32", (32, 32, 48)),
    "one_group": ((40, 16, 24), [40], "float32", None),
    "no_rows_of_any": ((40, 16, 24), [0, 0, 0], "float32", None),
    "rows_left_over": ((300, 16, 24), [20, 30], "float32", (32, 16, 24)),
    "sizes_beyond": ((40, 16, 24), [30, 30, 5], "float32", (32, 16, 24)),
    "more_groups_than_rows": ((5, 16, 24), [1, 0, 2, 0, 0, 1, 0, 1], "float32", None),
    "nothing_divides": ((70, 300, 200), [33, 35], "float32", (32, 128, 128)),
    "bfloat16": ((150, 256, 130), [20, 0, 100], "bfloat16", (32, 128, 128)),
}
NAMES = ("out", "dx", "dw")


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, one grid step after the other."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def arrays(shape, sizes, dtype, seed=0):
    rows, depth, columns = shape
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, depth))
    w = random.normal(size=(len(sizes), depth, columns))
    d_out = random.normal(size=(rows, columns))
    return tuple(jnp.asarray(each, dtype) for each in (x, w, d_out))


def values_and_gradients(implementation, x, w, d_out, sizes):
    """Output, dx and dw for the output's gradient d_out."""

    def product(x, w, sizes):
        return grouped_matmul(x, w, sizes, implementation)

    @jax.jit
    def run(x, w, d_out, sizes):
        out, back = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return out, *back(d_out)

    return run(x, w, d_out, jnp.asarray(sizes, jnp.int32))


def exact(x, w, d_out, sizes):
    """The three in float64, and what their rounding errors are measured by."""
    x, w, d_out = (np.asarray(each, np.float64) for each in (x, w, d_out))
    values = [np.zeros(d_out.shape), np.zeros(x.shape), np.zeros(w.shape)]
    scales = [np.zeros_like(each) for each in values]
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, min(start + size, len(x)))
        start += size
        for into, a, b, g in (
            (values, x[rows], w[group], d_out[rows]),
            (scales, abs(x[rows]), abs(w[group]), abs(d_out[rows])),
        ):
            into[0][rows], into[1][rows], into[2][group] = a @ b, g @ b.T, a.T @ g
    terms = (x.shape[1], w.shape[2], len(x))
    return values, [
        1e-6 * np.sqrt(n) * scale for n, scale in zip(terms, scales, strict=True)
    ]


def assert_exact(got, inputs, sizes):
    """Within 2 units in the last place and the error of float32 sums of the terms."""
    step = float(jnp.finfo(got[0].dtype).eps)
    for name, found, want, scale in zip(
        NAMES, got, *exact(*inputs, sizes), strict=True
    ):
        error = np.abs(np.asarray(found, np.float64) - want)
        allowed = 2 * step * np.abs(want) + scale
        worst = (error - allowed).max()
        assert worst <= 0, f"{name} is off by {worst:.1e} more than allowed"


def use_tiles(monkeypatch, tiles):
    """The same tile sizes in rows, depth and columns of the kernels' own products."""
    if tiles is not None:
        monkeypatch.setattr(plan, "product_tiles", lambda _: Tiles(*tiles))
        monkeypatch.setattr(plan, "weight_tiles", lambda _: Tiles(*tiles))


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_implementation_is_exact(name, implementation, interpreted, monkeypatch):
    shape, sizes, dtype, tiles = CASES[name]
    use_tiles(monkeypatch, tiles)
    inputs = arrays(shape, sizes, dtype)
    assert_exact(values_and_gradients(implementation, *inputs, sizes), inputs, sizes)


@pytest.mark.parametrize("detect_races", [False, True])
def test_tpu_kernels_read_nothing_unwritten(detect_races, monkeypatch, capfd):
    """In this interpreter memory is NaN until something was written there."""
    shape, sizes = (40, 150, 140), [10, 0, 19]
    use_tiles(monkeypatch, (16, 128, 128))
    inputs = arrays(shape, sizes, "float32")
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=detect_races)
    ):
        got = values_and_gradients("tpu", *inputs, sizes)
    assert_exact(got, inputs, sizes)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_rows_see_only_their_group(implementation, interpreted, monkeypatch):
    """An infinity in a row of another group, or of none, stays where it is."""
    use_tiles(monkeypatch, (32, 16, 24))
    sizes = [10, 13]
    x, w, d_out = arrays((40, 16, 24), sizes, "float32")
    rows = np.arange(40)
    bad = jnp.asarray((rows >= 10)[:, None], jnp.float32) * jnp.inf
    poisoned = jnp.where(bad > 0, jnp.inf, x), w, jnp.where(bad > 0, jnp.nan, d_out)
    got = values_and_gradients(implementation, *poisoned, sizes)
    want = values_and_gradients("reference", x, w, d_out, sizes)
    for found, wanted in ((got[0][:10], want[0][:10]), (got[1][:10], want[1][:10])):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2][0], want[2][0], rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(got[0][23:]) == 0) and np.all(np.asarray(got[1][23:]) == 0)


SCHEDULES = {
    make: jax.jit(getattr(schedule, make), static_argnums=(1, 2))
    for make in ("of_outputs", "of_groups")
}


def visits(make, sizes, rows, tile):
    """The steps, and a list of the (group, tile) that they visit."""
    steps = SCHEDULES[make](jnp.asarray(sizes, jnp.int32), rows, tile)
    steps = jax.tree.map(np.asarray, steps)
    count = int(steps.count[0])
    assert 1 <= count <= steps.group.size == schedule.step_bound(rows, tile, len(sizes))
    return steps, list(zip(steps.group[:count], steps.tile[:count], strict=True))


@pytest.mark.parametrize("rows, tile", [(50, 1), (50, 7), (48, 16), (50, 50), (1, 1)])
def test_schedule_covers_every_row_once(rows, tile):
    random = np.random.default_rng(0)
    for _ in range(20):
        sizes = random.integers(0, 2, 6) * random.integers(0, 20, 6)
        steps, visited = visits("of_outputs", sizes, rows, tile)
        found = np.full(rows, -1)
        for group, at in visited:
            begin = max(steps.start[group], at * tile)
            end = min(steps.end[group], (at + 1) * tile)
            assert begin < end and np.all(found[begin:end] == -1)
            found[begin:end] = group
        want = np.repeat(np.arange(7), [*sizes, 1000])[:rows]
        np.testing.assert_array_equal(found, want)
        # Visits of one tile are neighbours: its block is written once.
        assert visited == sorted(visited, key=lambda each: each[1])


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("tile", [1, 16])
def test_schedule_wastes_at_most_a_tile_per_group(make, tile):
    random = np.random.default_rng(0)
    for _ in range(20):
        sizes = random.integers(0, 40, 5)
        _, visited = visits(make, sizes, 200, tile)
        for group, size in enumerate(sizes):
            used = [at for g, at in visited if g == group]
            least = 1 if make == "of_groups" else int(size > 0)
            assert least <= len(used) <= -(-int(size) // tile) + 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        (8192, 4096, 14336, 8),
        (16384, 2048, 1408, 64),
        (64, 7168, 2048, 256),
        (4096, 65536, 65536, 4),
        (3, 5, 7, 2),
    ],
)
def test_tiles_fit(shape, itemsize):
    sizes = Sizes(*shape, itemsize)
    for tiles in (plan.product_tiles(sizes), plan.weight_tiles(sizes)):
        parts = tiles.rows, tiles.depth, tiles.columns
        for part, whole in zip(parts, shape[:3], strict=True):
            assert part == whole or (part < whole and part % 32 == 0)
        for part, whole in zip(parts[1:], shape[1:3], strict=True):
            assert part == whole or part % plan.LANES == 0


def test_xla_works_on_tiles_not_on_all_pairs():
    rows, groups = 1024, 32
    x, w, _ = arrays((rows, 64, 64), [0] * groups, "float32")
    sizes = jnp.full(groups, rows // groups, jnp.int32)
    compiled = jax.jit(functools.partial(grouped_matmul, implementation="xla"))
    memory = compiled.lower(x, w, sizes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * x.nbytes + w.nbytes


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_vmap_over_everything(implementation, interpreted):
    cases = [arrays((40, 16, 24), [0] * 3, "float32", seed=i) for i in range(2)]
    sizes = np.asarray([[10, 0, 25], [0, 40, 0]], np.int32)
    got = jax.vmap(functools.partial(values_and_gradients, implementation))(
        *(jnp.stack(each) for each in zip(*cases, strict=True)), sizes
    )
    for i, inputs in enumerate(cases):
        assert_exact([each[i] for each in got], inputs, sizes[i])


def test_inside_shard_map():
    """Experts on every device of `expert`, rows also over `data`."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "expert"))
    x, w, d_out = arrays((80, 16, 24), [0] * 8, "float32")
    sizes = jnp.asarray([[3, 4], [0, 10], [0, 0], [5, 5]] * 2, jnp.int32)

    def loss(x, w, sizes, d_out):
        out = grouped_matmul(x, w, sizes.reshape(-1))
        return jax.lax.psum((out * d_out).sum(), ("data", "expert"))

    rows = P(("data", "expert"))
    run = jax.shard_map(
        loss, mesh=mesh, in_specs=(rows, P("expert"), rows, rows), out_specs=P()
    )
    dx, dw = jax.jit(jax.grad(run, argnums=(0, 1)))(x, w, sizes, d_out)
    want_dw = np.zeros(w.shape)
    for device in range(8):
        part = slice(device * 10, device * 10 + 10)
        own = slice(device % 4 * 2, device % 4 * 2 + 2)
        inputs = x[part], w[own], d_out[part]
        values, _ = exact(*inputs, sizes[device].tolist())
        np.testing.assert_allclose(dx[part], values[1], rtol=1e-5, atol=1e-5)
        want_dw[own] += values[2]
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4", "fp6_e3m2", "fp8_e4m3"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_quantized_weights(format, implementation, interpreted, monkeypatch):
    """The products with the weights that the codes stand for, and no gradient."""
    use_tiles(monkeypatch, (32, 256, 256) if implementation == "tpu" else None)
    dtype = "float32" if format == "int4" else "bfloat16"
    sizes = [10, 0, 25]
    x, w, d_out = arrays((40, 300, 70), sizes, dtype)
    w = quantize(w, format)
    given = jnp.asarray(sizes, jnp.int32)
    out, back = jax.vjp(lambda x: grouped_matmul(x, w, given, implementation), x)
    got = out, *back(d_out)
    inputs = x, dequantize(w, jnp.float32), d_out
    values, scales = exact(*inputs, sizes)
    step = float(jnp.finfo(x.dtype).eps)
    # dx multiplies the rounded products of d_out and the scales.
    magnitudes = exact(
        *(np.abs(np.asarray(each, np.float64)) for each in inputs), sizes
    )
    rounded = (0, step * magnitudes[0][1])
    for found, want, scale, extra in zip(got, values, scales, rounded, strict=False):
        error = np.abs(np.asarray(found, np.float64) - want)
        assert np.all(error <= 2 * step * np.abs(want) + scale + extra)


def test_refuses_quantized_weights_without_columns_scales():
    x, w, _ = arrays((40, 256, 128), [0] * 3, "float32")
    sizes = jnp.zeros(3, jnp.int32)
    for bad in (quantize(w, "int8", group=128), quantize(w, "int8", symmetric=False)):
        with pytest.raises(ValueError, match="group=None and symmetric=True"):
            grouped_matmul(x, bad, sizes)
    with pytest.raises(ValueError, match="should be x"):
        grouped_matmul(x[:, :5], quantize(w, "int8"), sizes)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_platform_decides_when_lowering(platform):
    x, w, d_out = arrays((300, 16, 24), [0] * 3, "bfloat16")
    run = jax.jit(functools.partial(values_and_gradients, None))
    sizes = jnp.zeros(3, jnp.int32)
    lowered = run.trace(x, w, d_out, sizes).lower(lowering_platforms=(platform,))
    assert ("tpu_custom_call" in lowered.as_text()) == (platform == "tpu")


X, W, S = jnp.zeros((8, 4)), jnp.zeros((2, 4, 6)), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ((X, W[0], S), ValueError, r"should be x .M, K., w .G, K, N. and sizes"),
        ((X[:, :3], W, S), ValueError, r"x \(8, 3\), w \(2, 4, 6\)"),
        ((X, W, S[:1]), ValueError, r"sizes \(1,\) should be"),
        ((X[:0], W, S), ValueError, "is empty"),
        ((X, W.astype(jnp.bfloat16), S), TypeError, "float32 and bfloat16; give both"),
        ((X.astype(jnp.float16), W.astype(jnp.float16), S), TypeError, "one of"),
        ((X, W, S.astype(jnp.float32)), TypeError, "sizes are float32; give int32"),
        ((X, W, S, "cuda"), ValueError, "choose one of"),
        ((X, W, S, "gpu"), ValueError, "'gpu' cannot run here: .*take 'xla'"),
    ],
)
def test_refuses_what_does_not_fit(given, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(*given)
