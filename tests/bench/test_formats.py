"""The table of formats on a model that was never trained."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import cli
from jaxspeed.bench import formats
from jaxspeed.data import Data
from jaxspeed.models.attention import Places
from tests.test_convert import decoder, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = Data(sequence_length=16)
    return write_run(tmp_path_factory.mktemp("formats") / "run", decoder(), data=data)


def test_rows(folder):
    labels = ("float32", "bfloat16", "int4 g128")
    whole, half, packed = formats.measure("tiny", str(folder), labels)
    assert [row["format"] for row in (whole, half, packed)] == list(labels)
    assert (whole["bits_per_weight"], half["bits_per_weight"]) == (32, 16)
    # The seven matrices of a layer are stored as 256 x 128 codes and 2 x 128 scales.
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
    stored = 7 * (4 * 256 * 128 + 32 * 2 * 128)
    assert packed["bits_per_weight"] == stored / weights
    assert whole["gemm_error"] == whole["more_than_float32"] == 0
    assert 1e-4 < half["gemm_error"] < 2**-8 < packed["gemm_error"] < 0.5
    assert packed["bits_per_byte"] != whole["bits_per_byte"] > 4


def test_inputs_are_what_the_layers_multiply():
    """From the inputs of the last layer follows what the head sees."""
    model = decoder()
    tokens = jnp.arange(12).reshape(2, 6)
    row = jnp.broadcast_to(jnp.arange(6), (2, 6))
    batch = {"tokens": tokens, "positions": row, "segments": jnp.ones_like(row)}
    inputs = formats.matrix_inputs(model, batch)
    assert {len(each) for each in inputs.values()} == {2}
    places = Places(row, jnp.ones_like(row))
    x = model.embedding(tokens, row, formats.tensor.Region(split=False))
    for index in range(2):
        layer = jax.tree.map(lambda w, index=index: w[index], model.layers)
        names = ("attention/out", "feed_forward/down")
        after, hidden = (inputs[f"layers/{name}"][index] for name in names)
        out = layer.attention.out[...].reshape(-1, 16)
        x = x + (after @ out + hidden @ layer.feed_forward.down[...]).reshape(x.shape)
    head = model.head(model.head.norm(x), None)
    expected = model(tokens, places.positions, places.segments)
    np.testing.assert_allclose(head[..., : expected.shape[-1]], expected, atol=1e-5)


def test_an_interrupted_training_has_no_figures(monkeypatch):
    outcome = types.SimpleNamespace(interrupted=True)
    monkeypatch.setattr(formats, "train", lambda *arguments: outcome)
    monkeypatch.setattr(formats, "measure", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(KeyboardInterrupt):
        formats.run()


def test_other_benches_measure_no_run(capsys):
    assert cli.main(["bench", "zero", "--run=somewhere"]) == 2
    assert "bench zero takes no --run=somewhere" in capsys.readouterr().err
