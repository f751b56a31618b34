"""The loss in chunks of the sequence against whole logits."""

import jax
import numpy as np
import pytest

from jaxspeed.models import next_token
from jaxspeed.parallel import tensor

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 12, 8, 20


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (WIDTH, VOCABULARY))
    return x, head, jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCABULARY)


@pytest.mark.parametrize("tokens", [1, 5, 7, 1000])
def test_chunks_change_nothing(tokens, monkeypatch):
    monkeypatch.setattr(next_token, "CHUNK_BYTES", 4 * BATCH * VOCABULARY * tokens)
    x, head, targets = inputs()

    def chunked(x, head):
        return next_token.next_token_losses(
            lambda part: part @ head, x, targets, vocabulary=VOCABULARY
        ).sum()

    def whole(x, head):
        return tensor.cross_entropy(x @ head, targets).sum()

    found = jax.value_and_grad(chunked, (0, 1))(x, head)
    expected = jax.value_and_grad(whole, (0, 1))(x, head)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


def test_whole_logits_never_exist(monkeypatch):
    monkeypatch.setattr(next_token, "CHUNK_BYTES", 4 * BATCH * VOCABULARY * 3)
    x, head, targets = inputs()

    def loss(x, head):
        return next_token.next_token_losses(
            lambda part: part @ head, x, targets, vocabulary=VOCABULARY
        ).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, head).compile().as_text()
    assert f"f32[{BATCH},{LENGTH},{VOCABULARY}]" not in text
    assert f"f32[{BATCH * LENGTH},{VOCABULARY}]" not in text
    assert f"[{BATCH},3,{VOCABULARY}]" in text or f"[{BATCH * 3},{VOCABULARY}]" in text


@pytest.mark.parametrize(("length", "count"), [(8192, 8), (1024, 1), (8191, 8), (1, 1)])
def test_chunks_are_few(length, count):
    # Of a vocabulary of 128256, 1046 tokens fit.
    assert next_token.chunk_count(1, length, 128256) == count
