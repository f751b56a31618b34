"""Counts of programs whose work is known by construction."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxspeed as js
from jaxspeed.profiler import count, table

N = 16
MACS = N**3
X = jax.ShapeDtypeStruct((N, N), jnp.float32)


def test_a_matmul():
    found = count(lambda x, y: x @ y, jnp.ones((2, 3)), jnp.ones((3, 5)))
    assert (found.macs, found.flops, found.elementwise) == (30, 60, 0)
    assert found.bytes == 4 * (6 + 15 + 10)
    assert found.unknown == ()


def test_batched_contraction_and_grouped_convolution():
    found = count(
        lambda x, y: jnp.einsum("bij,bjk->bik", x, y),
        jnp.ones((4, 2, 3)),
        jnp.ones((4, 3, 5)),
    )
    assert found.macs == 4 * 2 * 3 * 5
    grouped = count(
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), "VALID", feature_group_count=2
        ),
        jnp.ones((1, 4, 8, 8)),
        jnp.ones((6, 2, 3, 3)),
    )
    assert grouped.macs == 6 * 6 * 6 * 2 * 9


def test_a_transposed_convolution_multiplies_only_what_is_there():
    found = count(
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "VALID"),
        jnp.ones((1, 8, 8, 3)),
        jnp.ones((2, 2, 3, 5)),
    )
    assert found.macs == 8 * 8 * 3 * 2 * 2 * 5


def test_ragged_matmul_counts_every_row_once():
    sizes = jnp.array([3, 5], jnp.int32)
    found = count(lax.ragged_dot, jnp.ones((8, 4)), jnp.ones((2, 4, 6)), sizes)
    assert found.macs == 8 * 4 * 6


def test_loops_multiply():
    def scanned(x):
        return lax.scan(lambda c, _: (lax.scan(step, c, None, 3)[0], None), x, None, 5)

    def step(c, _):
        return c @ c, None

    assert count(scanned, X).macs == 15 * MACS
    assert count(lambda x: lax.fori_loop(0, 7, lambda i, c: c @ c, x), X).macs == (
        7 * MACS
    )


def test_a_while_loop_is_counted_once_and_reported():
    def loop(x):
        with jax.named_scope("search"):
            return lax.while_loop(lambda c: c[0, 0] < 3.0, lambda c: c @ c, x)

    found = count(loop, X)
    assert found["search"].macs == MACS
    assert len(found.unknown) == 1 and "while loop in search" in found.unknown[0]


def test_of_a_conditional_the_larger_branch_counts():
    def either(x):
        return lax.cond(x[0, 0] > 0.0, lambda a: a @ a @ a, lambda a: a @ a, x)

    assert count(either, X).macs == 2 * MACS


def test_calls_are_entered():
    @jax.custom_vjp
    def product(x):
        return x @ x

    product.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda p, t: (square(*p), t[0] @ p[0]))
    assert count(jax.jit(product), X).macs == MACS
    assert count(jax.jit(square), X).macs == MACS
    gradient = count(jax.grad(lambda x: product(x).sum()), X)
    assert gradient.forward.macs == MACS
    assert gradient.backward.macs == 2 * MACS


@pytest.mark.parametrize(("recompute", "backward"), [(False, 6), (True, 9)])
def test_forward_backward_and_recomputation_apart(recompute, backward):
    def layer(x, w):
        with jax.named_scope("dense"):
            return jnp.tanh(x @ w), None

    def loss(w, x):
        with jax.named_scope("layers"):
            body = jax.checkpoint(layer) if recompute else layer
            return lax.scan(body, x, w)[0].sum()

    found = count(jax.grad(loss), jnp.ones((3, N, N)), X)
    assert found["layers/dense"].forward.macs == 3 * MACS
    assert found["layers/dense"].backward.macs == backward * MACS
    assert found.macs == (3 + backward) * MACS


def test_custom_gradients_stay_in_their_scope():
    """JAX repeats the scope of a custom backward pass: a/b, and a/b again inside."""

    @jax.custom_vjp
    def product(x):
        return x @ x

    product.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))

    def loss(x):
        with jax.named_scope("a"):
            with jax.named_scope("b"):
                x = product(x)
        with jax.named_scope("c"):
            return jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum()

    found = count(jax.grad(loss), X)
    assert [child.name for child in found.children if child.macs] == ["a", "c"]
    assert [child.name for child in found["a"].children] == ["b"]
    assert found["a/b"].backward.macs == MACS
    # The product again, and its gradient for both factors.
    assert found["c"].backward.macs == 3 * MACS


def test_shard_map_counts_all_devices():
    mesh = js.make_mesh(data=4, tensor=2)

    def split(x, w):
        return lax.psum(x @ w, "tensor")

    mapped = jax.shard_map(
        split,
        mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor")),
        out_specs=P("data"),
    )
    assert count(mapped, X, X).macs == MACS
    # Not split over `data`: four copies of the same work.
    copied = jax.shard_map(
        split, mesh=mesh, in_specs=(P(None, "tensor"), P("tensor")), out_specs=P()
    )
    assert count(copied, X, X).macs == 4 * MACS


def kernel(x, out):
    out[...] = x[...] * 2.0


def test_a_pallas_kernel_is_what_it_claims():
    def run(x, cost):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        with jax.named_scope("kernel"):
            return pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost)(x)

    cost = pl.CostEstimate(flops=100, transcendentals=7, bytes_accessed=64)
    found = count(lambda x: run(x, cost), X)["kernel"]
    assert (found.flops, found.macs) == (100, 50)
    assert (found.elementwise, found.bytes) == (7, 64)
    silent = count(lambda x: run(x, None), X)
    assert silent.flops == 0 and silent.bytes == 2 * 4 * N * N
    assert "Pallas kernel without cost_estimate in kernel" in silent.unknown[0]


def test_what_shapes_do_not_tell_is_reported():
    assert "cholesky" in count(jnp.linalg.cholesky, X).unknown[0]


def test_elementwise_operations_are_fused():
    """An update reads each input once and writes each output once."""

    def adam(p, m, g):
        m = 0.9 * m + 0.1 * g
        return p - 0.01 * m / (jnp.sqrt(m * m) + 1e-8), m

    found = count(adam, X, X, X)
    assert found.bytes == 5 * 4 * N * N
    assert found.elementwise == 9 * N * N
    # The norm's sum reads `x`; so does, again, what uses it.
    norm = count(lambda x: x / jnp.sum(x, axis=-1, keepdims=True), X)
    assert norm.bytes == 4 * (N * N + N) + 4 * (N + 2 * N * N)


def test_slices_move_what_they_take():
    table = jax.ShapeDtypeStruct((1000, N), jnp.float32)
    rows = jax.ShapeDtypeStruct((4,), jnp.int32)
    taken = count(lambda t, i: t.at[i].get(mode="fill"), table, rows)
    assert taken.bytes < 1000
    added = count(lambda t, i, x: t.at[i].add(x), table, rows, jnp.ones((4, N)))
    assert added.bytes < 1500 and added.elementwise >= 4 * N


def test_parameters_of_a_plain_function():
    def apply(params, x):
        with jax.named_scope("dense"):
            return x @ params["dense"]["kernel"]

    params = {"dense": {"kernel": jnp.ones((N, N))}, "scale": jnp.ones((3,))}
    found = count(apply, params, X, model=params)
    assert found["dense"].params == N * N and found.params == N * N + 3
    assert found["dense"].macs == MACS


def test_the_table():
    def nested(x):
        with jax.named_scope("outer"):
            x = x @ x
            with jax.named_scope("inner"):
                return x @ x @ x

    text = table(count(nested, X)).splitlines()
    assert [line.split()[0] for line in text[2:]] == ["total", "outer", "inner", "(in"]
    assert "66.7%" in text[4] and "33.3%" in text[5]
    assert len({len(line) for line in text}) == 1
    assert len(table(count(nested, X), 1).splitlines()) == 4
    with pytest.raises(ValueError, match="depth is -1"):
        table(count(nested, X), -1)


def test_as_json_has_every_figure():
    found = count(lambda x: jnp.tanh(x @ x), X).as_json()
    assert found["forward"]["macs"] == MACS and found["forward"]["bytes"] > 0
    assert found["backward"]["flops"] == 0 and found["unknown"] == []
