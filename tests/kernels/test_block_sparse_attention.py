"""Every implementation of block-sparse attention is dense attention with a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.block_sparse_attention import (
    BigBirdLayout,
    BSLongformerLayout,
    FixedLayout,
    LocalSlidingWindowLayout,
    VariableLayout,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    xla,
)

TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
"""Of the largest entry, as for flash attention."""


def scattered(heads, length, block, share):
    """Any blocks; most rows of them see little, some nothing."""
    count = -(-length // block)
    return np.random.default_rng(7).random((heads, count, count)) < share


# (length, heads, key heads, head dim), layout, tokens in its blocks, options.
CASES = {
    "fixed": (
        (300, 2, 1, 16),
        FixedLayout(num_heads=2, block=32, attention="unidirectional")(300),
        32,
        {},
    ),
    "fixed_per_head": (
        (300, 4, 2, 16),
        FixedLayout(
            num_heads=4,
            block=32,
            different_layout_per_head=True,
            num_different_global_patterns=4,
            horizontal_global_attention=True,
        )(300),
        32,
        {"causal": False},
    ),
    "variable": (
        (300, 2, 2, 16),
        VariableLayout(
            num_heads=2,
            local_window_blocks=(1, 3),
            global_block_indices=(0, 7),
            global_block_end_indices=(1, 9),
            num_random_blocks=1,
        )(300),
        16,
        {"segments": 3},
    ),
    "bigbird": (
        (300, 2, 1, 16),
        BigBirdLayout(num_heads=2, block=64, different_layout_per_head=True)(300),
        64,
        {"causal": False, "segments": 2},
    ),
    "longformer": (
        (600, 2, 1, 16),
        BSLongformerLayout(num_heads=2, block=128, attention="unidirectional")(600),
        128,
        {"scale": 0.4},
    ),
    "sliding": (
        (300, 1, 1, 64),
        LocalSlidingWindowLayout(num_heads=1, block=32)(300),
        32,
        {"dtype": "bfloat16"},
    ),
    "rows_without_keys": (
        (300, 4, 2, 16),
        scattered(4, 300, 24, 0.15),
        24,
        {"segments": 2},
    ),
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


def documents(length, number):
    ids = np.random.default_rng(1).integers(0, number, (2, length))
    return jnp.asarray(np.sort(ids, axis=1), jnp.int32)


def values_and_gradients(implementation, q, k, v, layout, **given):
    """Output, lse, and the gradients of a random mixture of both."""
    random = np.random.default_rng(2)
    batch, length, heads, _ = q.shape
    weights = jnp.asarray(random.normal(size=q.shape), jnp.float32)
    lse_weights = jnp.asarray(random.normal(size=(batch, heads, length)), jnp.float32)

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def mixture(q, k, v):
        out, lse = block_sparse_attention_with_lse(
            q, k, v, layout, implementation=implementation, **given
        )
        # Where nothing is seen the lse is huge, and drowns the others.
        some = jnp.where(lse > -1e30, lse, 0.0)
        mixed = (out.astype(jnp.float32) * weights).sum() + (some * lse_weights).sum()
        return mixed, (out, some, lse > -1e30)

    (_, results), gradients = jax.jit(mixture)(q, k, v)
    names = ("out", "lse", "some", "dq", "dk", "dv")
    return {
        name: np.asarray(x.astype(jnp.float32))
        for name, x in zip(names, (*results, *gradients), strict=True)
    }


def assert_same(got, want, tolerance):
    for name in want:
        error = np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
        assert error < tolerance, f"{name} is off by {error:.1e} of its largest entry"


def dense(q, k, v, layout, block, causal=True, segments=None, scale=None):
    """Softmax in numpy, float64, over the tokens that a layout lists."""
    batch, length, heads, head_dim = q.shape
    tokens = np.arange(length)
    seen = layout[:, tokens[:, None] // block, tokens[None] // block]
    if causal:
        seen = seen & (tokens[:, None] >= tokens[None])
    seen = np.broadcast_to(seen[None], (batch, heads, length, length))
    if segments is not None:
        ids = np.asarray(segments)
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(heads // x.shape[2], axis=2) for x in (k, v))
    scale = head_dim**-0.5 if scale is None else scale
    scores = np.exp(scale * np.einsum("bshk,bthk->bhst", q, k)) * seen
    total = scores.sum(axis=-1, keepdims=True)
    weights = np.divide(scores, total, where=total > 0, out=np.zeros_like(scores))
    return np.einsum("bhst,bthk->bshk", weights, v)


@functools.cache
def case(name):
    """Arrays, layout, options and the reference's results in float32."""
    shape, layout, block, given = CASES[name]
    given = dict(given, block=block)
    dtype = given.pop("dtype", "float32")
    if "segments" in given:
        given["segments"] = documents(shape[0], given["segments"])
    inputs = arrays(*shape, dtype=dtype)
    exact = [x.astype(jnp.float32) for x in inputs]
    return (
        inputs,
        layout,
        given,
        values_and_gradients("reference", *exact, layout, **given),
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_dense_attention_with_a_mask(name):
    inputs, layout, given, want = case(name)
    exact = dense(*inputs, layout, **given)
    assert np.abs(want["out"] - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("name", CASES)
def test_xla_is_the_reference(name):
    inputs, layout, given, want = case(name)
    got = values_and_gradients("xla", *inputs, layout, **given)
    assert_same(got, want, TOLERANCE[inputs[0].dtype.name])


@pytest.mark.parametrize("name", CASES)
def test_tpu_kernels_are_the_reference(name, interpreted):
    inputs, layout, given, want = case(name)
    got = values_and_gradients("tpu", *inputs, layout, **given)
    assert_same(got, want, TOLERANCE[inputs[0].dtype.name])


def test_xla_in_few_rows_at_once(monkeypatch):
    monkeypatch.setattr(xla, "ENTRIES", 2**16)
    inputs, layout, given, want = case("variable")
    got = values_and_gradients("xla", *inputs, layout, **given)
    assert_same(got, want, TOLERANCE["float32"])


@pytest.mark.parametrize("detect_races", [False, True])
def test_tpu_kernels_read_nothing_unwritten(detect_races, capfd):
    """In this interpreter memory is NaN until something was written there.

    It prints a race, or raises, as the version of JAX may be.
    """
    inputs, layout, given, want = case("rows_without_keys")
    params = pltpu.InterpretParams(detect_races=detect_races)
    with pltpu.force_tpu_interpret_mode(params):
        got = values_and_gradients("tpu", *inputs, layout, **given)
    assert_same(got, want, TOLERANCE["float32"])
    printed = capfd.readouterr()
    assert "race" not in (printed.out + printed.err).lower()


def test_queries_without_keys_get_zeros():
    _, _, _, want = case("rows_without_keys")
    blind = want["some"] == 0
    assert 0 < blind.mean() < 1
    assert not want["out"].swapaxes(1, 2)[blind].any()
    assert not want["dq"].swapaxes(1, 2)[blind].any()


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_no_later_token_is_seen(implementation, interpreted):
    """Not even of the token's own block."""
    q, k, v = arrays(100, 1, 1, 16)
    layout = np.ones((1, 7, 7), bool)
    options = dict(layout=layout, block=16, implementation=implementation)
    attend = jax.jit(functools.partial(block_sparse_attention, **options))
    changed = attend(q, k.at[:, 57:].add(1.0), v.at[:, 57:].add(1.0))
    same = np.asarray(changed == attend(q, k, v)).all(axis=(0, 2, 3))
    assert same[:57].all() and not same[57:].any()


def test_heads_split_over_devices():
    """Each device has the lists of its own heads."""
    shape, layout, block, given = CASES["fixed_per_head"]
    q, k, v = arrays(*shape)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    heads = P(None, None, "tensor")

    def loss(q, k, v):
        first = jax.lax.axis_index("tensor") * q.shape[2]
        out = block_sparse_attention(
            q, k, v, layout, block=block, first_head=first, **given
        )
        return jax.lax.psum((out**2).sum(), "tensor")

    def whole(q, k, v):
        out = block_sparse_attention(
            q, k, v, layout, block=block, implementation="reference", **given
        )
        return (out**2).sum()

    run = jax.shard_map(loss, mesh=mesh, in_specs=(heads,) * 3, out_specs=P())
    got = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(q, k, v)
    want = jax.value_and_grad(whole, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, rtol=0)


def test_tpu_kernels_of_some_heads(interpreted):
    shape, layout, block, given = CASES["fixed_per_head"]
    q, k, v = arrays(*shape)
    first = jnp.int32(2)
    attend = functools.partial(block_sparse_attention, block=block, **given)
    some = (q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])

    def loss(implementation, first, layout, *some):
        options = dict(first_head=first, implementation=implementation)
        return (attend(*some, layout, **options) ** 2).sum()

    gradient = jax.grad(loss, argnums=(3, 4, 5))
    got = jax.jit(lambda first: gradient("tpu", first, layout, *some))(first)
    want = gradient("reference", 0, layout[2:], *some)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max(), rtol=0)


def test_vmap_and_checkpoint():
    q, k, v = (jnp.stack([x, 2 * x]) for x in arrays(64, 2, 1, 16))
    layout = BigBirdLayout(num_heads=2)(64)

    @jax.checkpoint
    def attend(q, k, v):
        return (block_sparse_attention(q, k, v, layout, block=16) ** 2).sum()

    gradient = jax.jit(jax.grad(attend, argnums=(0, 1, 2)))
    got = jax.jit(jax.vmap(gradient))(q, k, v)
    want = [gradient(*each) for each in zip(q, k, v, strict=True)]
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        b = jnp.stack(b)
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max(), rtol=0)


def test_xla_memory_goes_with_the_listed_blocks():
    length = 8192
    layout = LocalSlidingWindowLayout(num_heads=1, block=128)(length)
    q, k, v = arrays(length, 1, 1, 16, batch=1)

    def loss(q, k, v):
        return block_sparse_attention(
            q, k, v, layout, block=128, implementation="xla"
        ).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    listed = layout.sum() * 128 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * listed
    assert 6 * listed < length * length * 4 / 4


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("block", [16, 20])
def test_platform_decides_when_lowering(platform, block):
    """Blocks that are no multiple of 8 cannot run in the kernels."""
    q, k, v = arrays(80, 2, 1, 64, dtype="bfloat16")
    layout = FixedLayout(num_heads=2, block=block)(80)
    attend = functools.partial(block_sparse_attention, layout=layout, block=block)
    lowered = jax.jit(attend).trace(q, k, v).lower(lowering_platforms=(platform,))
    kernel = platform == "tpu" and block == 16
    assert ("tpu_custom_call" in lowered.as_text()) == kernel


def shape(*sizes, dtype=jnp.float32):
    return jnp.zeros(sizes, dtype)


Q, KV = shape(2, 40, 4, 16), shape(2, 40, 2, 16)
ONE = np.ones((1, 3, 3), bool)


@pytest.mark.parametrize(
    "layout, given, error, message",
    [
        (ONE[0], {}, ValueError, r"layout \(3, 3\) should be \[P, N, N\]"),
        (ONE, {"block": 8}, ValueError, "3 x 3 blocks of 8 tokens .* a side, 5"),
        (ONE, {"block": 0}, ValueError, "does not fit 40 tokens"),
        (ONE.repeat(3, 0), {}, ValueError, "3 heads and q .* has 4; give a layout of"),
        (ONE.repeat(8, 0), {"first_head": 3}, ValueError, "multiple of the 2 query"),
        (ONE.repeat(4, 0), {"first_head": 2}, ValueError, "from 0 to 0"),
        (ONE, {"segments": shape(2, 40)}, TypeError, "give int32"),
        (ONE, {"implementation": "cuda"}, ValueError, "'tpu', 'xla', 'reference'"),
    ],
)
def test_refuses_what_does_not_fit(layout, given, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(Q, KV, KV, layout, **({"block": 16} | given))


def test_says_why_the_kernels_cannot_run():
    with pytest.raises(ValueError, match="a block of 20 tokens is no multiple of 8"):
        block_sparse_attention(
            Q, KV, KV, ONE[:, :2, :2], block=20, implementation="tpu"
        )


def test_refuses_a_layout_that_is_traced():
    attend = jax.jit(functools.partial(block_sparse_attention, block=16))
    with pytest.raises(TypeError, match="the layout is being traced"):
        attend(Q, KV, KV, jnp.asarray(ONE))
