"""Modules of flax.nnx by attribute path, without any change to them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxspeed import profiler
from jaxspeed.models import Decoder, DecoderConfig

N = 8


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(N, N, rngs=rngs)
        self.out = nnx.Linear(N, N, rngs=rngs)

    def project(self, x):
        return self.query(x)

    def __call__(self, x):
        return self.out(self.project(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = Attention(rngs)
        self.experts = nnx.List([nnx.Linear(N, N, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.attention(x)
        return sum(expert(x) for expert in self.experts)


class Model(nnx.Module):
    """Two blocks of its own, and three that are stacked and scanned."""

    def __init__(self, rngs):
        self.first, self.second = Block(rngs), Block(rngs)
        make = nnx.vmap(lambda key: Attention(nnx.Rngs(key)))
        self.stacked = make(jax.random.split(rngs.params(), 3))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.second(self.first(x)))
        scan = nnx.scan(
            lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return scan(x, self.stacked)

    def loss(self, x):
        return jnp.sum(self(x))


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: Model(nnx.Rngs(0)))


def test_attribute_paths(model):
    found = profiler.count(model, jnp.ones((2, N)))
    macs = 2 * N * N
    assert [child.name for child in found.children] == [
        "first",
        "second",
        "dropout",
        "stacked",
    ]
    assert found["first/attention/query"].macs == macs
    assert found["first/experts/1"].macs == macs
    assert found["second"].macs == 4 * macs
    # Slices of stacked layers are copies: found by their class and names.
    assert found["stacked/query"].macs == found["stacked/out"].macs == 3 * macs
    assert found["stacked/query"].params == 3 * (N * N + N)
    assert found.params == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    assert found.macs == (4 + 4 + 6) * macs


def test_methods_and_gradients(model):
    x = jnp.ones((2, N))
    assert profiler.count(model.loss, x).flops == profiler.count(model, x).flops
    found = profiler.count(lambda m, x: nnx.grad(Model.loss)(m, x), model, x)
    for path in ("first/attention/query", "stacked/out"):
        part = found[path]
        assert part.forward.macs > 0
        # Of the first layer's input no gradient is needed.
        factor = 1 if path.startswith("first") else 2
        assert part.backward.macs == factor * part.forward.macs


def test_two_modules_are_told_apart():
    one = nnx.eval_shape(lambda: Attention(nnx.Rngs(0)))
    two = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    found = profiler.count(lambda a, b, x: b(a(x)), one, two, jnp.ones((2, N)))
    assert found["Attention/out"].macs == found["Block/attention/out"].macs > 0
    assert found["Attention"].params == 2 * (N * N + N)
    twice = profiler.count(lambda a, b, x: b(a(x)), one, one, jnp.ones((2, N)))
    assert twice["Attention_0"].macs == twice["Attention_1"].macs == twice.macs // 2


def test_classes_are_left_as_they_were(model):
    before = [vars(kind)["__call__"] for kind in (Model, Attention, nnx.Linear)]

    def fail(model, x):
        model(x)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        profiler.count(fail, model, jnp.ones((2, N)))
    after = [vars(kind)["__call__"] for kind in (Model, Attention, nnx.Linear)]
    assert before == after


def test_the_decoder_by_its_parts():
    """Its own named scopes and its modules' paths do not double each other."""
    config = DecoderConfig(dim=32, num_layers=3)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    found = profiler.count(
        lambda m, b: nnx.grad(lambda m: m.loss(b).total)(m), abstract, batch
    )
    assert "layers" not in [child.name for child in found["layers"].children]
    hidden = config.feed_forward.hidden_dim
    macs = 3 * 2 * 64 * 3 * 32 * hidden
    assert found["layers/feed_forward"].forward.macs == macs
    # Full recomputation may leave out the last product, whose result is not needed.
    ratio = found["layers/feed_forward"].backward.macs / macs
    assert 2 + 2 / 3 <= ratio <= 3
    assert found["layers/attention_norm"].params == 3 * 32
    assert found["head"].forward.macs == 2 * 64 * 32 * config.padded_vocab
