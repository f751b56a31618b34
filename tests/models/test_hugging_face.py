"""Models written by `transformers`, loaded by us, and written back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jaxspeed.mesh import make_mesh
from jaxspeed.models import from_pretrained, save_pretrained
from jaxspeed.models.hugging_face.layout import Stored
from jaxspeed.parallel.zero import Zero
from tests.models import fidelity

transformers.utils.logging.disable_progress_bar()
BY_NAME = {case.name: case for case in fidelity.CASES}


@pytest.fixture(autouse=True)
def no_implicit_promotion():
    """The model must not rely on broadcasting between different ranks."""
    with jax.numpy_rank_promotion("raise"):
        yield


def written(name: str, folder: Path) -> Path:
    """A case's folder, written by `transformers`."""
    fidelity.write(BY_NAME[name], folder)
    return folder


@pytest.mark.parametrize("case", fidelity.CASES, ids=lambda case: case.name)
def test_logits_equal_transformers(case):
    row = fidelity.measure(case)
    assert row["logit_std"] > 1
    for column in ("one_device", "tensor_2", "written_back"):
        assert row[column] < fidelity.TOLERANCE, row


@pytest.mark.parametrize(
    "name",
    [
        "llama, 1 kv head, tied",
        "qwen2, upper windows",
        "gpt2",
        "bloom, 6 heads, float16",
    ],
)
def test_the_same_inside_shard_map(name, tmp_path):
    tokens = fidelity.tokens_for(BY_NAME[name])
    reference = fidelity.load_reference(written(name, tmp_path))
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    graph, state = nnx.split(from_pretrained(tmp_path, mesh=mesh))
    specs = jax.tree.map(lambda array: array.sharding.spec, state)

    def call(state, tokens):
        return nnx.merge(graph, state)(tokens)[None]

    call = jax.jit(
        jax.shard_map(call, mesh=mesh, in_specs=(specs, P()), out_specs=P(("tensor",)))
    )
    for length in (fidelity.LENGTH, fidelity.LENGTH - 1):  # split, and not divisible
        expected = fidelity.reference_logits(reference, tokens[:, :length])
        both = np.asarray(call(state, jnp.asarray(tokens[:, :length])))
        assert both.shape == (2, *expected.shape)
        np.testing.assert_allclose(both[0], expected, atol=fidelity.TOLERANCE)
        np.testing.assert_array_equal(both[0], both[1])


def test_the_fidelity_command(monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "CASES", fidelity.CASES[:1])
    assert fidelity.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "fidelity"
    assert [row["case"] for row in report["rows"]] == ["llama"]
    monkeypatch.setattr(fidelity, "TOLERANCE", 0.0)
    assert fidelity.main([]) == 1
    assert "1 device" in capsys.readouterr().out


def test_shards_lie_where_the_rules_say(tmp_path):
    written("llama, 1 kv head, tied", tmp_path)
    whole = from_pretrained(tmp_path)
    mesh = make_mesh(data=4, tensor=2)
    split = from_pretrained(tmp_path, mesh=mesh, zero=Zero(stage=3, min_size=64))
    specs = {
        "query": split.layers.attention.query[...].sharding.spec,  # [L, D, H, K]
        "key": split.layers.attention.key[...].sharding.spec,  # [L, D, G, K], G = 1
        "down": split.layers.feed_forward.down[...].sharding.spec,  # [L, F, D]
        "tokens": split.embedding.tokens[...].sharding.spec,  # [V, D]
        "scale": split.head.norm.scale[...].sharding.spec,  # 48 elements: too small
    }
    assert specs == {
        "query": P(None, "data", "tensor"),
        "key": P(None, "data"),
        "down": P(None, "tensor", "data"),
        "tokens": P("tensor", "data"),
        "scale": P(),
    }
    for a, b in zip(
        jax.tree.leaves(nnx.state(whole)),
        jax.tree.leaves(nnx.state(split)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_no_more_than_one_layer_is_read_at_a_time(tmp_path, monkeypatch):
    written("llama", tmp_path)
    take, sizes = Stored.take, []

    def record(self, source, letters, index, lengths):
        value = take(self, source, letters, index, lengths)
        sizes.append((self.name, value.size))
        return value

    monkeypatch.setattr(Stored, "take", record)
    mesh = make_mesh(data=4, tensor=2)
    from_pretrained(tmp_path, mesh=mesh)
    gate = [size for name, size in sizes if "gate_proj" in name]
    # 3 layers of [80, 48], each half read once for the 4 devices that hold it
    assert gate == [80 * 48 // 2] * 6
    norm = [size for name, size in sizes if "input_layernorm" in name]
    assert norm == [48] * 3


def test_vocabulary_padding_is_zero_and_not_written(tmp_path):
    written("gpt2", tmp_path)
    model = from_pretrained(tmp_path)
    table = np.asarray(model.embedding.tokens[...])
    assert table.shape == (256, 48)
    assert np.abs(table[:131]).min() > 0
    assert not table[131:].any()
    model.embedding.tokens[...] = model.embedding.tokens[...].at[131:].set(7.0)
    save_pretrained(model, tmp_path / "back")
    stored = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(stored["transformer.wte.weight"], table[:131])


def test_vocabulary_is_padded_for_a_tensor_axis_that_is_no_power_of_two(tmp_path):
    written("bloom, 6 heads, float16", tmp_path)
    mesh = make_mesh(tensor=3, devices=jax.devices()[:3])
    model = from_pretrained(tmp_path, mesh=mesh)
    assert model.config.padded_vocab == 384
    tokens = fidelity.tokens_for(BY_NAME["bloom, 6 heads, float16"])
    expected = fidelity.reference_logits(fidelity.load_reference(tmp_path), tokens)
    logits = fidelity.our_logits(model, tokens)
    np.testing.assert_allclose(logits, expected, atol=fidelity.TOLERANCE)


def test_a_tensor_axis_that_does_not_divide_the_heads_is_refused(tmp_path):
    written("gpt2", tmp_path)  # 4 heads
    with pytest.raises(ValueError, match=r"tensor=8 does not divide dim 'heads'"):
        from_pretrained(tmp_path, mesh=make_mesh(tensor=8))


def test_weights_in_bfloat16(tmp_path):
    written("llama, bfloat16, shards", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    model = from_pretrained(tmp_path, dtype=jnp.bfloat16)
    arrays = jax.tree.leaves(nnx.state(model))
    assert {array.dtype for array in arrays} == {jnp.bfloat16.dtype}
    # the files are bfloat16, so nothing is rounded in either direction
    save_pretrained(model, tmp_path / "back")
    assert (
        json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    )
    theirs = fidelity.load_reference(tmp_path).state_dict()
    back = fidelity.load_reference(tmp_path / "back").state_dict()
    assert theirs.keys() == back.keys()
    assert all((theirs[name] == back[name]).all() for name in theirs)
