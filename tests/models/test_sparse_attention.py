"""Block-sparse attention in the decoder against whole scores under a mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxspeed as js
from jaxspeed.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    FeedForwardConfig,
    PositionConfig,
    SparseConfig,
)
from jaxspeed.models.attention import Places, dense_attention, masked_attention, visible
from jaxspeed.models.flops import model_flops
from jaxspeed.models.sparse_attention import SparseAttention
from tests.parallel import contract

HEADS = 4
SPARSE = {
    "fixed": SparseConfig(
        "fixed",
        block=2,
        different_layout_per_head=True,
        num_local_blocks=4,
        num_different_global_patterns=4,
    ),
    "variable": SparseConfig(
        "variable", block=2, local_window_blocks=(1, 2), global_block_indices=(1,)
    ),
    "bigbird": SparseConfig("bigbird", block=2, seed=3),
    "bslongformer": SparseConfig("bslongformer", block=4),
    "local": SparseConfig("local", block=3),
}


def config_with(sparse):
    return DecoderConfig(
        vocab_size=61,
        dim=16,
        num_layers=2,
        attention=AttentionConfig(HEADS, 2, 6, sparse=sparse),
        feed_forward=FeedForwardConfig(24),
        vocab_multiple=4,
    )


def masked(sparse):
    """An attention function with whole scores; all heads are here."""

    def attend(q, k, v, queries, keys, window, slopes):
        length, heads = q.shape[1:3]
        block = np.arange(length) // sparse.block
        listed = sparse.layout(heads, length)[:, block][:, :, block]
        if window is not None:
            listed = jnp.where(window == 0, listed, True)
        return masked_attention(q, k, v, visible(queries, keys, None)[:, None] & listed)

    return attend


@pytest.mark.parametrize("name", SPARSE)
def test_each_mode_equals_a_mask(name):
    """13 tokens in two documents; no block divides either."""
    sparse, length = SPARSE[name], 13
    q, k, v = (
        jax.random.normal(key, (2, length, heads, 6))
        for key, heads in zip(
            jax.random.split(jax.random.key(0), 3), (HEADS, 2, 2), strict=True
        )
    )
    place = jnp.arange(length)
    second = jnp.array([[5], [20]]) <= place
    places = Places(jnp.where(second, place - 5, place), 1 + second.astype(jnp.int32))
    attend = SparseAttention(sparse, HEADS)
    expected = masked(sparse)(q, k, v, places, places, None, None)
    found = jax.jit(lambda q: attend(q, k, v, places, places, None, None))(q)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    dense = dense_attention(q, k, v, places, places, None, None)
    assert np.abs(dense - expected).max() > 1e-2
    # The whole row of the second sample is one document, as in a cache.
    cached = Places(places.positions + 0, places.segments + 0)
    found = attend(q, k, v, places, cached, None, None)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


def test_training_on_a_mesh_equals_a_mask_on_one_device():
    """A layout for each head, heads over `tensor`; one layer of two is sparse."""
    sparse = dataclasses.replace(SPARSE["fixed"], layers=(1,))
    config = config_with(sparse)
    batch = next(contract.batches())
    batch["tokens"], batch["targets"] = batch["tokens"] % 61, batch["targets"] % 61
    engine = js.initialize(
        js.Config(batch=js.Batch(size=16)),
        lambda rngs: Decoder(config, rngs=rngs, remat_policy="none"),
        optax.sgd(1.0),
        mesh=contract.mesh_of(dict(data=4, tensor=2)),
    )
    state = engine.init(jax.random.key(1))
    before = jax.tree.map(np.asarray, engine.params(state))
    state, metrics = engine.step(state, batch)
    model = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), attention=masked(sparse))
    )
    graph, variables = nnx.split(model)
    nnx.replace_by_pure_dict(variables, before)

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        loss = nnx.merge(graph, variables).loss(batch)
        return loss.total / loss.weight

    expected, gradients = loss(variables)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-6)
    found = jax.tree.map(np.subtract, before, engine.params(state))
    for a, b in zip(
        jax.tree.leaves(found),
        jax.tree.leaves(nnx.to_pure_dict(gradients)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("name", SPARSE)
def test_visible_keys_are_those_of_a_mask(name):
    """Apart from the diagonal blocks, half of which count."""
    sparse, length = SPARSE[name], 23
    tokens = np.arange(length) // sparse.block
    seen = sparse.layout(HEADS, length)[:, tokens][:, :, tokens].astype(float)
    seen[:, tokens[:, None] == tokens] /= 2
    found = sparse.visible_keys(HEADS, length)
    assert found == pytest.approx(seen.mean(axis=0).sum() / length)


def test_flops_count_the_listed_pairs():
    length, block = 24, 4
    sparse = SparseConfig(
        "local", block=block, num_sliding_window_blocks=3, layers=(0,)
    )
    dense = config_with(SparseConfig())
    pairs = length // block * block**2 / 2 + (length // block - 1) * block**2
    saved = 12 * HEADS * 6 * (length**2 / 2 - pairs)
    found = model_flops(config_with(sparse), length, length)
    assert model_flops(dense, length, length) - found == pytest.approx(saved)
    everything = SparseConfig("local", num_sliding_window_blocks=99)
    assert model_flops(config_with(everything), 20, 20) == pytest.approx(
        model_flops(dense, 20, 20)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SparseConfig("strided"), "sparse.mode is 'strided'; choose one of"),
        (
            lambda: SparseConfig(num_random_blocks=3, block=0),
            "sparse.block is given, but mode 'dense' has .* leave block, num_random",
        ),
        (
            lambda: SparseConfig("bslongformer", global_block_indices=(-1,)),
            r"global_block_indices=\(-1,\); give 0 or more",
        ),
        (
            lambda: SparseConfig("local", num_random_blocks=1),
            "sparse.num_random_blocks is given, but mode 'local' has only the fields",
        ),
        (
            lambda: SparseConfig("fixed", num_local_blocks=4, num_global_blocks=3),
            "num_global_blocks=3 should divide",
        ),
        (
            lambda: AttentionConfig(window=4, sparse=SparseConfig("local")),
            "attention.window=4 and attention.sparse.mode='local' are both given",
        ),
        (
            lambda: dataclasses.replace(
                config_with(SparseConfig("local")), position=PositionConfig("alibi")
            ),
            "attention.sparse.mode='local' does not go with position.kind='alibi'",
        ),
        (
            lambda: dataclasses.replace(
                config_with(SparseConfig("local", layers=(0, 2))), num_layers=2
            ),
            r"attention.sparse.layers is \(0, 2\); the model has layers 0 to 1",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
