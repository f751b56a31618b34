"""The figures of DeepSpeed's tests of its flops profiler, from the same models in nnx.

DeepSpeed counts, besides two FLOPs per multiply-add, a bias after a convolution, every
input of a pooling and every output of a softmax; not tanh, not the bias of a linear
layer and not a cross-entropy. Its own tolerance is 5 %.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxspeed import profiler

TOLERANCE = 0.05


class Pool(nnx.Module):
    """Averages over windows of 2 by 2."""

    def __call__(self, x):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4


class Softmax(nnx.Module):
    """Over the last dim."""

    def __call__(self, x):
        return jax.nn.softmax(x)


class LeNet5(nnx.Module):
    """As in DeepSpeed's test_flops_profiler.py, with channels last."""

    def __init__(self, classes, rngs):
        def conv(inputs, outputs):
            return nnx.Conv(inputs, outputs, (5, 5), padding="VALID", rngs=rngs)

        self.feature_extractor = nnx.Sequential(
            conv(1, 6), jnp.tanh, Pool(), conv(6, 16), jnp.tanh, Pool(), conv(16, 120)
        )
        self.classifier = nnx.Sequential(
            nnx.Linear(120, 84, rngs=rngs), jnp.tanh, nnx.Linear(84, classes, rngs=rngs)
        )
        self.softmax = Softmax()

    def __call__(self, x):
        x = jnp.tanh(self.feature_extractor(x))
        logits = self.classifier(x.reshape(x.shape[0], -1))
        return logits, self.softmax(logits)


class Simple(nnx.Module):
    """One linear layer and a cross-entropy."""

    def __init__(self, dim, rngs):
        self.linears = nnx.List([nnx.Linear(dim, dim, rngs=rngs)])

    def __call__(self, x, y):
        logits = self.linears[0](x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(y.shape[0]), y])


@pytest.fixture(scope="module")
def lenet():
    images = jax.ShapeDtypeStruct((1024, 32, 32, 1), jnp.float32)
    model = nnx.eval_shape(lambda: LeNet5(10, nnx.Rngs(0)))
    return profiler.count(model, images)


def test_lenet(lenet):
    assert lenet.flops == pytest.approx(866_076_672, rel=TOLERANCE)
    assert lenet.macs == 426_516_480
    assert lenet.params == 61_706


def test_lenet_to_the_last_flop(lenet):
    """What DeepSpeed counts besides is found in the modules it counts it in."""
    layers = lenet["feature_extractor/layers"]
    biases = sum(layers[name].elementwise for name in ("0", "3", "6"))
    # An average pool adds up its windows, then divides each sum.
    pools = sum(layers[name].elementwise for name in ("2", "5"))
    means = 1024 * (14 * 14 * 6 + 5 * 5 * 16)
    softmax = 1024 * 10
    assert lenet["softmax"].elementwise >= softmax
    assert lenet.flops + biases + (pools - means) + softmax == 866_076_672


def test_simple_model():
    model = nnx.eval_shape(lambda: Simple(10, nnx.Rngs(0)))
    found = profiler.count(model, jnp.ones((1, 10)), jnp.zeros((1,), jnp.int32))
    assert found.flops == 200 and found.macs == 100
    assert found.params == 110
    assert found["linears/0"].flops == 200
    assert found["linears/0"].elementwise == 10
