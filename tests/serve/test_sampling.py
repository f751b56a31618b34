"""Which tokens can be drawn, and how often."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.serve import Sampling, sample

PROBABILITIES = np.array([0.1, 0.5, 0.15, 0.25], np.float32)


def draws(sampling, count=4000, probabilities=PROBABILITIES):
    logits = jnp.tile(jnp.log(probabilities), (count, 1))
    draw = jax.jit(partial(sample, sampling=sampling))
    return np.asarray(draw(logits, jax.random.key(7)))


def frequencies(sampling):
    ids = draws(sampling)
    return np.bincount(ids, minlength=len(PROBABILITIES)) / len(ids)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        # Probabilities to the power 1 / 0.5, renormalised by their sum 0.345.
        (Sampling(temperature=0.5), PROBABILITIES**2 / 0.345),
        (Sampling(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(top_k=9), PROBABILITIES),
        (Sampling(top_p=0.5), [0, 1, 0, 0]),  # the first reaches p exactly
        (Sampling(top_p=0.51), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(top_p=0.8), [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (Sampling(top_p=1.0), PROBABILITIES),
        # Of 2/3 and 1/3 the first is not enough; of 0.5 and 0.25 it is not either.
        (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),
        # Squared, the first has 0.25 / 0.345 = 0.72.
        (Sampling(temperature=0.5, top_p=0.7), [0, 1, 0, 0]),
    ],
)
def test_frequencies(sampling, expected):
    found = frequencies(sampling)
    # Five standard deviations of 4000 draws with probability 1/2.
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 4000**0.5)
    np.testing.assert_array_equal(found > 0, np.asarray(expected) > 0)


def test_one_token_left_equals_greedy():
    logits = jax.random.normal(jax.random.key(0), (64, 100))
    greedy = logits.argmax(axis=-1)
    key = jax.random.key(1)
    choices = (
        Sampling(temperature=0),
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
        Sampling(temperature=1e-30),
    )
    for sampling in choices:
        drawn = sample(logits, key, sampling)
        assert drawn.dtype == jnp.int32
        np.testing.assert_array_equal(drawn, greedy)


def test_equal_tokens_keep_exactly_k():
    uniform = np.full(8, 1 / 8, np.float32)
    assert set(draws(Sampling(top_k=3), probabilities=uniform)) == {0, 1, 2}
    assert set(draws(Sampling(top_p=0.25), probabilities=uniform)) == {0, 1}


def test_impossible_tokens_are_never_drawn():
    lowest = jnp.finfo(jnp.bfloat16).min
    logits = jnp.array([[lowest, 0, lowest, 0]] * 200, jnp.bfloat16)
    for sampling in (Sampling(), Sampling(top_p=1.0), Sampling(temperature=10.0)):
        drawn = sample(logits, jax.random.key(0), sampling)
        assert set(np.asarray(drawn)) == {1, 3}


def test_draws_follow_the_key():
    logits = jnp.zeros((1, 1000))
    first, again, other = (
        int(sample(logits, jax.random.key(seed), Sampling())[0]) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; give a positive number, or 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; give at least 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0; give a probability above 0 and up to 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, r"seed is -1; give one from 0 to 2\*\*32 - 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
