"""The layer scan that gathers ahead, against a plain loop over whole weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxspeed import comm
from jaxspeed.mesh import AXES, make_mesh
from jaxspeed.models.remat import POLICIES
from jaxspeed.parallel import zero
from jaxspeed.parallel.prefetch import scan_layers
from jaxspeed.plan import collectives

WIDTH, HIDDEN, SAMPLES = 16, 24, 16
AXIS = "data"


def layer(weights, x, shared, own):
    hidden = jnp.tanh(x @ weights["up"]) * shared.astype(x.dtype)[None]
    out = hidden @ weights["down"] + weights["bias"][None]
    return x + out * own.astype(x.dtype)


def arguments(depth):
    keys = jax.random.split(jax.random.key(0), 4)
    layers = {
        "up": jax.random.normal(keys[0], (depth, WIDTH, HIDDEN)) / 16,
        "down": jax.random.normal(keys[1], (depth, HIDDEN, WIDTH)) / 16,
        "bias": jax.random.normal(keys[2], (depth, WIDTH)),
    }
    x = jax.random.normal(keys[3], (SAMPLES, WIDTH))
    return layers, x, jnp.arange(HIDDEN) % 3, 1 + jnp.arange(depth) % 2


def plain(layers, x, shared, per_layer):
    for i in range(per_layer.size):
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        x = layer(weights, x, shared, per_layer[i])
    return jnp.sum(jnp.sin(x))


def placement(stage):
    return zero.Placement(P(), P(), stage, -2, (AXIS,), jnp.float32, jnp.float32)


def pipelined(mesh, stage, policy):
    """Loss and gradients of the layers, the matrices in shards."""
    in_shards = {"up": P(None, AXIS), "down": P(None, AXIS), "bias": P()}
    whole = dict.fromkeys(in_shards, P())

    def local(layers, x, shared, per_layer):
        place = placement(stage)

        def objective(variables, x):
            view = {
                name: leaf
                if name == "bias"
                else zero.Shard(
                    leaf,
                    comm.vary(layers[name], AXES) if stage == 2 else None,
                    place,
                )
                for name, leaf in variables.items()
            }
            y = scan_layers(
                layer, x, view, shared=shared, per_layer=per_layer, policy=policy
            )
            return jnp.sum(jnp.sin(y))

        variables = {
            name: comm.vary(leaf, AXES)
            if name == "bias"
            else zero.variable(place, leaf)
            for name, leaf in layers.items()
        }
        loss, (gradients, dx) = jax.value_and_grad(objective, (0, 1))(variables, x)
        gradients["bias"] = comm.all_reduce(gradients["bias"], AXIS)
        return comm.all_reduce(loss, AXIS), gradients, dx

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(in_shards if stage == 3 else whole, P(AXIS), P(), P()),
            out_specs=(P(), in_shards, P(AXIS)),
        )
    )


@functools.cache
def mesh():
    return make_mesh(data=8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("stage", "depth"), [(3, 1), (3, 2), (3, 4), (2, 3)])
def test_equals_a_plain_loop(stage, depth, policy):
    given = arguments(depth)
    loss, gradients, dx = pipelined(mesh(), stage, POLICIES[policy])(*given)
    expected, wanted = jax.value_and_grad(plain, (0, 1))(*given)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        (gradients, dx),
        wanted,
    )


def test_gathers_each_layer_twice_and_the_last_once():
    depth = 4
    step = pipelined(mesh(), 3, POLICIES["full"])
    found = collectives(step.lower(*arguments(depth)).compile(), mesh())
    sent = {"all-gather": 0, "reduce-scatter": 0}
    for each in found:
        if each.op in sent:
            sent[each.op] += each.bytes_sent
    once = 4 * 2 * WIDTH * HIDDEN * 7 // 8
    assert sent["all-gather"] == (2 * depth - 1) * once
    assert sent["reduce-scatter"] == depth * once


def scans(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_layer_keeps_its_weights(policy):
    depth = 4
    step = pipelined(mesh(), 3, POLICIES[policy])
    jaxpr = jax.make_jaxpr(step)(*arguments(depth))
    found = list(scans(jaxpr.jaxpr))
    kept = {
        out.aval.shape
        for equation in found
        for out in equation.outvars[equation.params["num_carry"] :]
    }
    assert len(found) == 2 and kept
    for whole in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        assert (depth - 1, *whole) not in kept
    activations = {shape for shape in kept if shape[1:2] == (SAMPLES // 8,)}
    assert (depth - 1, 2, WIDTH) in activations
    assert ((depth - 1, 2, HIDDEN) in activations) == (policy != "full")
