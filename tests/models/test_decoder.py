"""The decoder: packing, windows, remat policies, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspeed.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
)
from jaxspeed.models.attention import Places, dense_attention
from jaxspeed.models.layers import alibi_slopes, rope_frequencies
from jaxspeed.models.remat import POLICIES

CONFIG = DecoderConfig(
    vocab_size=50,
    dim=24,
    num_layers=3,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(hidden_dim=40),
    vocab_multiple=16,
)
FAMILIES = {
    "rope": CONFIG,
    "window": dataclasses.replace(
        CONFIG,
        attention=dataclasses.replace(CONFIG.attention, window=3, window_layers=(1,)),
    ),
    "learned": dataclasses.replace(
        CONFIG,
        position=PositionConfig(kind="learned", max_length=32),
        norm=NormConfig(kind="layer"),
        tied=True,
    ),
    "alibi": dataclasses.replace(
        CONFIG, position=PositionConfig(kind="alibi"), embedding_norm=True, tied=True
    ),
}


def decoder(config, **options):
    """A decoder with weights large enough for every part to matter."""
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, model)


def tokens(length, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, CONFIG.vocab_size, (1, length)).astype(np.int32)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_do_not_see_each_other(name):
    model = jax.jit(decoder(FAMILIES[name]))
    first, second = tokens(7, 1), tokens(9, 2)
    together = model(
        np.concatenate([first, second], axis=1),
        np.concatenate([np.arange(7), np.arange(9)])[None].astype(np.int32),
        np.asarray([[1] * 7 + [2] * 9], np.int32),
    )
    np.testing.assert_allclose(together[:, :7], model(first), atol=2e-5)
    np.testing.assert_allclose(together[:, 7:], model(second), atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_is_causal(name):
    model = jax.jit(decoder(FAMILIES[name]))
    a, b = tokens(12), tokens(12)
    b[0, 8] = (b[0, 8] + 1) % CONFIG.vocab_size
    difference = np.abs(np.asarray(model(a) - model(b))).max(axis=(0, 2))
    assert (difference[:8] == 0).all() and difference[8] > 1e-3


def test_a_window_ends_what_one_layer_sees():
    config = dataclasses.replace(
        CONFIG,
        num_layers=1,
        attention=dataclasses.replace(CONFIG.attention, window=3),
    )
    model = jax.jit(decoder(config))
    a, b = tokens(12), tokens(12)
    b[0, 4] = (b[0, 4] + 1) % CONFIG.vocab_size
    difference = np.abs(np.asarray(model(a) - model(b))).max(axis=(0, 2))
    assert (difference > 0).nonzero()[0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_policies_change_no_gradient(policy):
    batch = {"tokens": tokens(12), "targets": np.roll(tokens(12), -1)}

    def loss(model):
        return model.loss(batch).total

    plain = jax.grad(loss)(decoder(CONFIG, remat_policy="none"))
    other = jax.grad(loss)(decoder(CONFIG, remat_policy=policy))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_padded_vocabulary_is_never_predicted():
    model = decoder(CONFIG)
    assert CONFIG.padded_vocab == 64
    assert model(tokens(5)).shape == (1, 5, 50)
    region_logits = model.embedding.tokens[...].shape[0]
    assert region_logits == 64
    batch = {"tokens": tokens(5), "targets": tokens(5, 3)}
    gradient = jax.grad(lambda m: m.loss(batch).total)(model)
    assert float(jnp.abs(gradient.head.projection[...][:, 50:]).max()) == 0.0


def test_the_loss_is_cross_entropy_of_the_logits():
    model, inputs, targets = decoder(CONFIG), tokens(9), tokens(9, 5)
    weights = (np.arange(9) % 2).astype(np.float32)[None]
    loss = model.loss({"tokens": inputs, "targets": targets, "weights": weights})
    logs = jax.nn.log_softmax(model(inputs))
    picked = -np.take_along_axis(np.asarray(logs), targets[..., None], axis=-1)[..., 0]
    assert float(loss.total) == pytest.approx(float((picked * weights).sum()), rel=1e-5)
    assert float(loss.weight) == weights.sum()


def test_alibi_slopes_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    twelve = alibi_slopes(12)
    np.testing.assert_allclose(twelve[:8], alibi_slopes(8))
    np.testing.assert_allclose(twelve[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_llama3_frequencies_keep_fast_and_stretch_slow_ones():
    config = PositionConfig(
        theta=500000.0, scaling="llama3", factor=8.0, original_length=8192
    )
    plain = rope_frequencies(PositionConfig(theta=500000.0), 128)
    scaled = rope_frequencies(config, 128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionConfig(heads=6, kv_heads=4), "not a multiple of"),
        (lambda: AttentionConfig(window=0), r"attention.window=0"),
        (lambda: NormConfig(kind="batch"), r"norm.kind is 'batch'"),
        (lambda: PositionConfig(kind="sine"), r"position.kind is 'sine'"),
        (lambda: PositionConfig(scaling="yarn"), r"position.scaling is 'yarn'"),
        (lambda: FeedForwardConfig(activation="mish"), r"activation is 'mish'"),
        (lambda: DecoderConfig(num_layers=0), r"model.num_layers is 0"),
        (
            lambda: decoder(CONFIG, remat_policy="all").loss(
                {"tokens": tokens(4), "targets": tokens(4)}
            ),
            r"remat policy 'all'; choose one of",
        ),
    ],
)
def test_refuses_what_it_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_alone_mark_documents():
    """A position that does not grow starts a new document."""
    model = jax.jit(decoder(CONFIG))
    row = np.concatenate([tokens(7, 1), tokens(9, 2)], axis=1)
    positions = np.concatenate([np.arange(7), np.arange(9)])[None].astype(np.int32)
    segments = np.asarray([[1] * 7 + [2] * 9], np.int32)
    np.testing.assert_array_equal(
        model(row, positions), model(row, positions, segments)
    )


def test_negative_targets_do_not_count_and_impossible_ones_show():
    model, inputs, targets = decoder(CONFIG), tokens(6), tokens(6, 3)
    weights = np.asarray([[1, 1, 0, 1, 0, 1]], np.float32)
    ignored = np.where(weights > 0, targets, -100)
    some = model.loss({"tokens": inputs, "targets": ignored})
    same = model.loss({"tokens": inputs, "targets": targets, "weights": weights})
    assert float(some.weight) == 4
    assert float(some.total) == pytest.approx(float(same.total), rel=1e-6)
    targets[0, 0] = CONFIG.vocab_size
    assert np.isnan(float(model.loss({"tokens": inputs, "targets": targets}).total))


def test_refuses_more_tokens_than_learned_positions():
    with pytest.raises(ValueError, match="learned only 32 positions"):
        decoder(FAMILIES["learned"])(tokens(33))


def test_half_precision_scores_do_not_overflow():
    q = jnp.full((1, 2, 1, 128), 32.0, jnp.float16)
    row = jnp.arange(2)[None]
    places = Places(row, jnp.ones_like(row))
    out = dense_attention(q, q, q, places, places, None, None)
    assert np.isfinite(np.asarray(out)).all()
