"""Every implementation of flash attention is the reference, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention import (
    flash_attention,
    flash_attention_with_lse,
    tpu,
    xla,
)
from kernels_pallas.flash_attention.schedule import Blocks, Schedule

# Of the largest entry. Float32 sums in another order; bfloat16 rounds the weights and
# the gradients of the scores to 8 bits before they are multiplied.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}

# (length, heads, key heads, head dim) and options. One block of 128 keys or less; an
# odd and an even number of blocks; lengths that are no multiple of anything.
CASES = {
    "one_block": ((20, 2, 2, 16), {}),
    "odd_blocks": ((300, 2, 1, 64), {}),
    "even_blocks": ((1300, 1, 1, 16), {}),
    "large_block": ((900, 1, 1, 16), {"segments": 3}),
    "groups_of_four": ((150, 8, 2, 128), {"scale": 0.2}),
    "wide_heads": ((150, 1, 1, 192), {}),
    "documents": ((300, 2, 2, 16), {"segments": 4}),
    "window": ((300, 2, 1, 16), {"window": 70}),
    "traced_window": ((300, 2, 1, 16), {"window": np.int32(129)}),
    "slopes": ((300, 4, 2, 16), {"slopes": True}),
    "everything": ((300, 4, 2, 16), {"segments": 3, "window": 90, "slopes": True}),
    "softcap": ((300, 2, 1, 96), {"softcap": 2.0, "segments": 2}),
    "sinks": ((300, 4, 2, 16), {"sinks": True}),
    "bidirectional": ((300, 2, 1, 16), {"causal": False}),
    "bidirectional_window": (
        (300, 2, 1, 16),
        {"causal": False, "window": 70, "slopes": True},
    ),
    "bidirectional_traced_window": (
        (400, 2, 1, 16),
        {"causal": False, "window": np.int32(129), "segments": 2},
    ),
    "all_options": (
        (300, 4, 2, 16),
        dict(segments=3, window=90, slopes=True, softcap=1.5, sinks=True),
    ),
    "bfloat16": ((300, 2, 1, 64), {"dtype": "bfloat16", "segments": 3}),
}


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on CPU, one grid step after the other."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def arrays(length, heads, groups, head_dim, dtype="float32", batch=2):
    random = np.random.default_rng(0)
    return tuple(
        jnp.asarray(random.normal(size=(batch, length, n, head_dim)), dtype)
        for n in (heads, groups, groups)
    )


def options(
    length, heads, segments=None, slopes=False, window=None, sinks=False, **others
):
    random = np.random.default_rng(1)
    if segments is not None:
        ids = np.sort(random.integers(0, segments, (2, length)), axis=1)
        segments = jnp.asarray(ids, jnp.int32)
    if isinstance(window, np.int32):
        window = jnp.asarray(window)
    slopes = 2.0 ** -jnp.arange(1, heads + 1, dtype=jnp.float32) if slopes else None
    sinks = jnp.linspace(-1, 3, heads, dtype=jnp.float32) if sinks else None
    found = dict(segments=segments, window=window, slopes=slopes, sinks=sinks)
    return found | others


def values_and_gradients(implementation, q, k, v, **given):
    """Output, lse, and the gradients of a random mixture of both."""
    random = np.random.default_rng(2)
    batch, length, heads, _ = q.shape
    weights = jnp.asarray(random.normal(size=q.shape), jnp.float32)
    lse_weights = jnp.asarray(random.normal(size=(batch, heads, length)), jnp.float32)

    given = dict(given)
    sinks = given.pop("sinks", None)

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    def mixture(q, k, v, sinks):
        out, lse = flash_attention_with_lse(
            q, k, v, implementation=implementation, sinks=sinks, **given
        )
        mixed = (out.astype(jnp.float32) * weights).sum() + (lse * lse_weights).sum()
        return mixed, (out, lse)

    (_, results), gradients = jax.jit(mixture)(q, k, v, sinks)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    return {
        name: np.asarray(x.astype(jnp.float32))
        for name, x in zip(names, (*results, *gradients), strict=True)
        if x is not None
    }


def assert_same(got, want, tolerance):
    for name in want:
        error = np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
        assert error < tolerance, f"{name} is off by {error:.1e} of its largest entry"


@functools.cache
def case(name):
    """Arrays, options and the reference's results in float32."""
    shape, given = CASES[name]
    given = dict(given)
    dtype = given.pop("dtype", "float32")
    given = options(*shape[:2], **given)
    inputs = arrays(*shape, dtype=dtype)
    exact = [x.astype(jnp.float32) for x in inputs]
    return inputs, given, values_and_gradients("reference", *exact, **given)


@pytest.mark.parametrize("name", CASES)
def test_xla_is_the_reference(name):
    inputs, given, want = case(name)
    got = values_and_gradients("xla", *inputs, **given)
    assert_same(got, want, TOLERANCE[inputs[0].dtype.name])


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels_are_the_reference(name, interpreted):
    inputs, given, want = case(name)
    got = values_and_gradients("tpu", *inputs, **given)
    assert_same(got, want, TOLERANCE[inputs[0].dtype.name])


def test_xla_in_many_blocks(monkeypatch):
    monkeypatch.setattr(xla, "block_size", lambda length, rows: 64)
    names = ("documents", "all_options", "traced_window", "bidirectional_window")
    for name in names:
        inputs, given, want = case(name)
        assert_same(
            values_and_gradients("xla", *inputs, **given), want, TOLERANCE["float32"]
        )


def test_tpu_kernels_read_nothing_unwritten():
    """In this interpreter memory is NaN until something was written there."""
    inputs, given, want = case("all_options")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = values_and_gradients("tpu", *inputs, **given)
    assert_same(got, want, TOLERANCE["float32"])


def test_tpu_kernels_have_no_races(capfd):
    """This interpreter prints a race, or raises, as the version of JAX may be."""
    inputs, given, want = case("bidirectional")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = values_and_gradients("tpu", *inputs, **given)
    assert_same(got, want, TOLERANCE["float32"])
    printed = capfd.readouterr()
    assert "race" not in (printed.out + printed.err).lower()


def places(schedule):
    """For each row of the grid the fields of `Place` of its steps."""

    def fields(row, step):
        at = schedule.locate(row, step, None)
        flags = (at.first, at.last, at.runs)
        return jnp.stack([at.outer, at.inner, *(x.astype(jnp.int32) for x in flags)])

    rows = jnp.arange(schedule.rows, dtype=jnp.int32)
    steps = jnp.arange(schedule.width, dtype=jnp.int32)
    of_row = jax.vmap(fields, (None, 0))
    return jax.jit(jax.vmap(of_row, (0, None)))(rows, steps).tolist()


@pytest.mark.parametrize("window", [None, 1, 130, 400])
@pytest.mark.parametrize(
    "sizes", [(128, 128, 128), (640, 128, 128), (768, 256, 128), (768, 128, 256)]
)
@pytest.mark.parametrize("by_query", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_schedule_visits_every_pair_once(sizes, window, by_query, causal):
    length, query, key = sizes
    blocks = Blocks(length, query, key, window, causal)
    schedule = Schedule(blocks, by_query)
    place = np.arange(length)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0 if causal else True) & (abs(distance) < (window or length))
    seen = seen.reshape(length // query, query, length // key, key).any((1, 3))
    wanted = {(int(i), int(j)) for i, j in zip(*np.nonzero(seen), strict=True)}

    visited = []
    for steps in places(schedule):
        open_at = None
        for outer, inner, first, last, runs in steps:
            if not runs:
                assert not first and not last
                continue
            visited.append((outer, inner) if by_query else (inner, outer))
            assert first == (open_at is None)
            assert open_at in (None, outer)
            open_at = None if last else outer
        assert open_at is None
    assert sorted(visited) == sorted(wanted)
    assert set(map(tuple, blocks.pairs().tolist())) == wanted
    assert blocks.count == len(wanted)


def test_schedule_without_a_window_has_no_idle_steps():
    for blocks in (Blocks(1024, 128, 128), Blocks(1024, 256, 128)):
        for by_query in (True, False):
            schedule = Schedule(blocks, by_query)
            assert schedule.rows * schedule.width == blocks.count


def test_block_sizes_waste_at_most_an_eighth():
    for length in (1, 100, 129, 1000, 1100, 4000, 8192, 100_000):
        size = tpu.block_size(length, 128, jnp.bfloat16)
        padded = -(-length // 128) * 128
        assert -(-length // size) * size <= padded * 9 / 8
    assert tpu.block_size(8192, 256, jnp.bfloat16) == 1024
    assert tpu.block_size(8192, 256, jnp.float32) == 512


def sharded(mesh, specs, *inputs):
    """Value and gradients of a sum over the devices of `mesh`."""

    def loss(q, k, v, segments):
        out = flash_attention(q, k, v, segments=segments)
        return jax.lax.psum((out**2).sum(), ("data", "tensor"))

    run = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*inputs)


@pytest.mark.parametrize("kv_heads", ["split", "whole"])
def test_inside_shard_map(kv_heads):
    """Also where keys are the same on devices that hold different query heads."""
    q, k, v = arrays(40, 8, 4 if kv_heads == "split" else 1, 16)
    segments = options(40, 8, segments=3)["segments"]
    heads = P("data", None, "tensor")
    kv = heads if kv_heads == "split" else P("data")
    specs = (heads, kv, kv, P("data"))
    devices = np.array(jax.devices()[:8])
    many = Mesh(devices.reshape(2, 4), ("data", "tensor"))
    one = Mesh(devices[:1].reshape(1, 1), ("data", "tensor"))
    got = sharded(many, specs, q, k, v, segments)
    want = sharded(one, specs, q, k, v, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("saved", [(), ("flash_attention",)])
def test_in_a_checkpointed_scan_with_a_window_per_layer(saved):
    q, k, v = arrays(40, 2, 1, 16)
    windows = jnp.asarray([3, 40, 11], jnp.int32)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def layer(implementation, q, window):
        attend = functools.partial(flash_attention, implementation=implementation)
        return attend(q, k, v, window=window)

    def scanned(q):
        def body(q, window):
            return jax.checkpoint(functools.partial(layer, None), policy=policy)(
                q, window
            ), None

        return (jax.lax.scan(body, q, windows)[0] ** 2).sum()

    def looped(q):
        for window in windows.tolist():
            q = layer("reference", q, window)
        return (q**2).sum()

    got, want = jax.jit(jax.grad(scanned))(q), jax.grad(looped)(q)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_largest_traced_window_is_none(causal, interpreted):
    q, k, v = arrays(200, 1, 1, 16, batch=1)

    def gradient(window):
        def total(q, k, v):
            given = dict(window=window, causal=causal, implementation="tpu")
            return (flash_attention(q, k, v, **given) ** 2).sum()

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    got = jax.jit(gradient)(jnp.int32(2**31 - 1))
    for mine, want in zip(got, gradient(None), strict=True):
        np.testing.assert_allclose(mine, want, atol=1e-5 * np.abs(want).max())


def test_a_kept_output_is_not_computed_again():
    q, k, v = arrays(300, 2, 1, 16)

    def forward_kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(lambda *x: flash_attention(*x).sum(), policy=policy)
        traced = jax.jit(jax.value_and_grad(layer)).trace(q, k, v)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        return text.count('kernel_name = "flash_attention_forward"')

    assert forward_kernels("flash_attention") == 1
    assert forward_kernels() == 2


def test_vmap():
    q, k, v = (jnp.stack([x, 2 * x]) for x in arrays(40, 2, 1, 16))
    got = jax.vmap(flash_attention)(q, k, v)
    want = jnp.stack([flash_attention(*each) for each in zip(q, k, v, strict=True)])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_xla_never_holds_all_scores():
    """Not even under a policy that keeps the results of matmuls."""
    q, k, v = arrays(4096, 1, 1, 16, batch=1)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def loss(q, k, v):
        return flash_attention(q, k, v, implementation="xla").sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 6


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_platform_decides_when_lowering(platform):
    q, k, v = arrays(300, 2, 1, 64, dtype="bfloat16")
    gradient = jax.grad(lambda *x: flash_attention(*x).astype(jnp.float32).sum())
    lowered = jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    assert ("stablehlo.while" in text) == (platform != "tpu")


def shape(*sizes, dtype=jnp.float32):
    return jnp.zeros(sizes, dtype)


Q, KV = shape(2, 8, 4, 16), shape(2, 8, 2, 16)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ((Q[0], KV, KV), ValueError, "q .8, 4, 16."),
        ((Q, KV, KV[:, :4]), ValueError, "should be q .B, S, H, K."),
        ((Q, KV[:, :4], KV[:, :4]), ValueError, "differ in more than their heads"),
        ((Q, KV[..., :8], KV[..., :8]), ValueError, "differ in more than their heads"),
        ((Q[:, :, :3], KV, KV), ValueError, "3 heads and k .* has 2"),
        ((Q, KV.astype(jnp.bfloat16), KV), TypeError, "float32, bfloat16 and float32"),
        ((Q.astype(jnp.int32),) * 3, TypeError, "one of .'float32', 'bfloat16'"),
    ],
)
def test_refuses_arrays_that_do_not_fit(given, error, message):
    with pytest.raises(error, match=message):
        flash_attention(*given)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(segments=shape(2, 9, dtype=jnp.int32)), ValueError, r"\(2, 8\)"),
        (dict(segments=shape(2, 8)), TypeError, "give int32"),
        (dict(slopes=shape(2)), ValueError, r"\(4,\), one number per head"),
        (dict(slopes=shape(4, dtype=jnp.int32)), TypeError, "give float32"),
        (dict(sinks=shape(2)), ValueError, r"sinks .*\(4,\), one number per head"),
        (dict(softcap=0.0), ValueError, "softcap=0.0; give the bound"),
        (dict(window=0), ValueError, "window=0; give at least 1"),
        (dict(window=shape(1, dtype=jnp.int32)), ValueError, "an int32 scalar"),
        (dict(implementation="cuda"), ValueError, "'tpu', 'gpu', 'xla'"),
    ],
)
def test_refuses_options_that_do_not_fit(given, error, message):
    with pytest.raises(error, match=message):
        flash_attention(Q, KV, KV, **given)
