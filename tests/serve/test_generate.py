"""Generation with a cache against whole forward passes, on one device and many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspeed.mesh import make_mesh
from jaxspeed.models.attention import dense_attention
from jaxspeed.models.layers import (
    AttentionConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
)
from jaxspeed.models.sparse_attention import SparseConfig
from jaxspeed.models.transformer import Decoder, DecoderConfig
from jaxspeed.serve import Sampling, complete, generate

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], [60], [7, 8] * 9]  # the longest needs a bucket of 32
STEPS = 6


def config(attention=None, **options):
    return DecoderConfig(
        vocab_size=61,
        dim=32,
        num_layers=2,
        attention=AttentionConfig(4, 2, 8, **(attention or {})),
        feed_forward=FeedForwardConfig(64),
        vocab_multiple=8,
        **options,
    )


CONFIGS = {
    "rope": config({"qk_norm": True}),
    "window": config({"window": 3, "window_layers": (1,)}),
    "sparse": config({"sparse": SparseConfig("local", block=4)}),
    "bigbird": config({"sparse": SparseConfig("bigbird", block=2)}),
    "alibi": config(position=PositionConfig("alibi"), embedding_norm=True, tied=True),
    "learned": config(
        {"qkv_bias": True},
        position=PositionConfig("learned", 32),
        norm=NormConfig("layer"),
    ),
}


@functools.cache
def decoder(name="rope", **options):
    """Weights ten times the usual, so that tokens depend on all that came before."""
    model = Decoder(CONFIGS[name], rngs=nnx.Rngs(0), **options)
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, model)


def recomputed(model, prompt, steps):
    """Greedy tokens, with a forward pass over the whole sequence for each."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(model, jnp.asarray(padded))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_greedy_equals_recomputing(name):
    model = decoder(name)
    expected = [recomputed(model, prompt, STEPS) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 3
    found = complete(model, PROMPTS, max_new_tokens=STEPS, sampling=GREEDY)
    assert found == expected


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=20, seed=5)])
def test_row_does_not_depend_on_the_other_rows(sampling):
    model = decoder()
    options = {"max_new_tokens": STEPS, "sampling": sampling}
    together = complete(model, PROMPTS[:2], **options)
    assert complete(model, PROMPTS[:1], **options) == together[:1]


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": 2, "seq": 2, "tensor": 2}])
def test_mesh_equals_one_device(sizes):
    model = decoder()
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**{"data": 1} | sizes, devices=jax.devices()[:count])
    for sampling in (GREEDY, Sampling(top_p=0.9, seed=2**32 - 1)):
        options = {"max_new_tokens": STEPS, "sampling": sampling}
        expected = complete(model, PROMPTS, **options)
        assert complete(model, PROMPTS, mesh=mesh, **options) == expected


def test_more_devices_than_key_heads():
    model = decoder("window")
    mesh = make_mesh(data=1, tensor=4, devices=jax.devices()[:4])
    options = {"max_new_tokens": STEPS, "sampling": GREEDY}
    expected = complete(model, PROMPTS, **options)
    assert complete(model, PROMPTS, mesh=mesh, **options) == expected


def test_seed_sets_the_draws():
    model = decoder()

    def run(seed):
        sampling = Sampling(seed=seed)
        return complete(model, PROMPTS, max_new_tokens=STEPS, sampling=sampling)

    first = run(0)
    assert run(0) == first != run(1)
    # The same prompt twice gives two samples.
    twice = complete(model, [[5], [5]], max_new_tokens=STEPS, sampling=Sampling(seed=3))
    assert twice[0] != twice[1]


def test_end_stops_rows_and_then_all():
    model = decoder()
    free = complete(model, PROMPTS, max_new_tokens=STEPS, sampling=GREEDY)
    end = free[0][2]
    stops = [row.index(end) + 1 if end in row else STEPS for row in free]
    options = {"max_new_tokens": STEPS, "sampling": GREEDY, "end": end}
    cut = complete(model, PROMPTS, **options)
    assert cut == [row[:stop] for row, stop in zip(free, stops, strict=True)]
    steps = list(generate(model, PROMPTS, **options))
    assert len(steps) == max(stops)
    assert [int(step[0]) for step in steps[2:]] == [end] * len(steps[2:])
    alone = list(generate(model, PROMPTS[:1], **options))
    assert len(alone) == stops[0] < STEPS


def test_tokens_arrive_one_step_at_a_time():
    stream = generate(decoder(), PROMPTS, max_new_tokens=2, sampling=GREEDY)
    for step in (next(stream), next(stream)):
        assert isinstance(step, np.ndarray)
        assert step.shape == (3,) and step.dtype == np.int32
    with pytest.raises(StopIteration):
        next(stream)


def test_other_lengths_and_seeds_compile_nothing():
    traces = []

    def attention(*inputs):
        traces.append(1)
        return dense_attention(*inputs)

    model = decoder(attention=attention)
    for prompts, seed in (([[1]], 0), ([[5] * 16], 1)):
        sampling = Sampling(seed=seed)
        complete(model, prompts, max_new_tokens=3, sampling=sampling)
    assert len(traces) == 2  # the prompt, and one token


def test_weights_may_lie_on_another_mesh():
    model, mesh = decoder(), make_mesh()
    options = {"max_new_tokens": 2, "sampling": GREEDY}
    expected = complete(model, PROMPTS, **options)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert complete(jax.device_put(model, whole), PROMPTS, **options) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty; start it with a token"),
        (
            {"prompts": [[0, 61]]},
            "prompt 0 has ids from 0 to 61, but the model's vocabulary is 0 to 60",
        ),
        ({"prompts": [[-1]]}, "ids from -1 to -1"),
        (
            {"prompts": [[1] * 30], "max_new_tokens": 3},
            "prompt 0 has 30 tokens and max_new_tokens is 3, together 33; .* has 32",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
        ({"end": 61}, "end is 61; the model's ids are 0 to 60"),
    ],
)
def test_errors_come_before_anything_runs(change, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 1, "sampling": GREEDY} | change
    with pytest.raises(ValueError, match=message):
        generate(decoder("learned"), **arguments)


def test_indivisible_mesh_is_refused():
    mesh = make_mesh(data=1, tensor=8)
    with pytest.raises(ValueError, match="tensor=8 does not divide dim 'heads'"):
        generate(decoder(), [[1]], max_new_tokens=1, sampling=GREEDY, mesh=mesh)
