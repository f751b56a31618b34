"""Model FLOPs against the matmuls that a program without waste would have."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxspeed import profiler
from jaxspeed.models import AttentionConfig, Decoder, DecoderConfig, FeedForwardConfig
from jaxspeed.models.flops import matmul_parameters, model_flops

CONFIG = DecoderConfig(
    vocab_size=256,
    dim=64,
    num_layers=3,
    attention=AttentionConfig(heads=8, kv_heads=2, head_dim=16),
    feed_forward=FeedForwardConfig(hidden_dim=96),
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_matmul_parameters_are_the_matrices_of_the_model(tied, gated):
    hidden = dataclasses.replace(CONFIG.feed_forward, gated=gated)
    config = dataclasses.replace(CONFIG, tied=tied, feed_forward=hidden)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if not tied:
        state.pop("embedding")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    matrices = sum(leaf.size for path, leaf in leaves if "norm" not in str(path))
    assert matmul_parameters(config) == matrices


def test_llama_3_8b():
    config = DecoderConfig(
        vocab_size=128256,
        dim=4096,
        num_layers=32,
        attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128),
        feed_forward=FeedForwardConfig(hidden_dim=14336),
    )
    parameters = 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096
    assert matmul_parameters(config) == parameters
    per_token = 6 * parameters + 12 * 32 * 32 * 128 * 8192 / 2
    assert model_flops(config, 8192, 8192) == 8192 * per_token


def test_equals_the_counted_forward_pass_thrice():
    """Dense attention makes all scores; the model needs those that are not masked."""
    batch, length = 2, 32
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    counted = 3 * profiler.count(model, tokens).flops
    masked = 12 * 3 * 8 * 16 * length / 2 * batch * length
    assert model_flops(CONFIG, batch * length, length) + masked == counted


def test_windows():
    """A window as long as the sequence is none; a short one costs its width."""
    attention = dataclasses.replace(CONFIG.attention, window=64, window_layers=(0, 2))
    windowed = dataclasses.replace(CONFIG, attention=attention)
    assert model_flops(windowed, 64, 64) == model_flops(CONFIG, 64, 64)
    length = 4096
    dense = model_flops(CONFIG, length, length)
    saved = 12 * 8 * 16 * 2 * (length / 2 - (64 - 64**2 / (2 * length)))
    assert dense - model_flops(windowed, length, length) == length * saved
