"""Decoders with quantized weights: what they compute, on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxspeed as js
from jaxspeed.data import ByteTokenizer
from jaxspeed.mesh import make_mesh
from jaxspeed.models import AttentionConfig, Decoder, DecoderConfig, FeedForwardConfig
from jaxspeed.models.linear import is_quantized
from jaxspeed.serve import Sampling, complete
from jaxspeed.train import evaluate_model
from kernels_pallas.quant_matmul import dequantize

CONFIG = DecoderConfig(
    dim=32,
    num_layers=2,
    attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64, qkv_bias=True),
    feed_forward=FeedForwardConfig(512),
)
"""Two devices can share its packed weights, but for those of keys and values."""


@functools.cache
def decoder():
    """Weights eight times the usual, so that every part matters."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, model)


@jax.jit
def logits(model, tokens):
    return model(tokens)


@functools.cache
def quantized(format, **options):
    return js.quantize(decoder(), format, **options)


def written_out(model):
    """The decoder with the values of its quantized weights as arrays."""
    graph, state = nnx.split(decoder())

    def value(packed, like):
        return dequantize(packed).reshape(like.shape) if is_quantized(packed) else like

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    values = jax.tree.map(value, params, nnx.to_pure_dict(state), is_leaf=is_quantized)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


@pytest.mark.parametrize(
    ("format", "options"),
    [("fp6_e3m2", {}), ("int4", {"group": 128, "symmetric": False, "head": True})],
)
def test_logits_are_those_of_the_rounded_weights(format, options):
    model = quantized(format, **options)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_quantized)
    assert sum(map(is_quantized, leaves)) == 7 + options.get("head", False)
    tokens = jnp.arange(24).reshape(2, 12)
    found, expected = logits(model, tokens), logits(written_out(model), tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)
    assert np.abs(expected - logits(decoder(), tokens)).max() > 0.01 * scale


def test_generates_on_two_devices_what_is_likeliest():
    """All rows of a matrix are on one device, or half of them; columns likewise."""
    model = quantized("fp6_e3m2")
    prompts = np.arange(16).reshape(2, 8)
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=0)}
    mesh = make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    drawn = np.asarray(complete(model, prompts.tolist(), mesh=mesh, **options))
    tokens = np.concatenate([prompts, drawn], axis=1)
    likeliest = logits(written_out(model), jnp.asarray(tokens)).argmax(axis=-1)
    np.testing.assert_array_equal(likeliest[:, 7:-1], drawn)


def test_held_out_text_on_a_mesh():
    options = {"batch_size": 4, "num_batches": 1, "tokenizer": ByteTokenizer()}
    data = js.Data(sequence_length=16)
    model = quantized("fp6_e3m2")
    expected = evaluate_model(written_out(model), data, **options)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    found = evaluate_model(model, data, mesh=mesh, **options)
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_saved_and_loaded(tmp_path):
    model, file = quantized("fp6_e3m2"), tmp_path / "model.safetensors"
    js.models.save_quantized(model, str(file))
    loaded = js.models.load_quantized(CONFIG, str(file))
    leaves = jax.tree.leaves_with_path(loaded)
    for (path, a), b in zip(leaves, jax.tree.leaves(model), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    with pytest.raises(ValueError, match="save it with jaxspeed"):
        js.models.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def with_infinity():
    graph, state = nnx.split(decoder())
    state = jax.tree.map(lambda x: x, state)
    up = state["layers"]["feed_forward"]["up"]
    up.set_value(up.get_value().at[1, 2, 3].set(jnp.inf))
    return nnx.merge(graph, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: js.quantize(decoder(), "int3"), r"format 'int3'; choose one of"),
        (lambda: js.quantize(decoder(), "int8", group=100), "layers/.*: group=100"),
        (
            lambda: js.quantize(quantized("fp6_e3m2"), "int8"),
            "is quantized already; quantize the original",
        ),
        (
            lambda: js.quantize(with_infinity(), "int8"),
            "layers/feed_forward/up: 1 of the weights .* are not finite",
        ),
        (
            lambda: complete(
                quantized("fp6_e3m2"),
                [[1]],
                max_new_tokens=1,
                sampling=Sampling(),
                mesh=make_mesh(data=1, tensor=4, devices=jax.devices()[:4]),
            ),
            r"out: K=512 of fp6_e3m2 is packed in blocks of 256 .* share it: \[1, 2\]",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_a_tied_head():
    config = DecoderConfig(vocab_size=61, dim=8, num_layers=1, tied=True)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="head is its embedding table"):
        js.quantize(model, "int8", head=True)
