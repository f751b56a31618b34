"""Run folders to Hugging Face folders and back, and models from both."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxspeed.checkpoint import Checkpoint, open_store
from jaxspeed.config import Config, from_json, to_json
from jaxspeed.convert import convert, load_model
from jaxspeed.data import BareIds, ByteTokenizer, Data, HuggingFaceTokenizer
from jaxspeed.mesh import make_mesh
from jaxspeed.models import quantize
from jaxspeed.models.hugging_face import save_pretrained
from jaxspeed.models.layers import AttentionConfig, FeedForwardConfig
from jaxspeed.models.transformer import Decoder, DecoderConfig


def decoder(vocab_size=257):
    config = DecoderConfig(
        vocab_size=vocab_size,
        dim=16,
        num_layers=2,
        attention=AttentionConfig(2, 1, 8),
        feed_forward=FeedForwardConfig(32),
        vocab_multiple=8,
    )
    return Decoder(config, rngs=nnx.Rngs(1))


def write_run(folder, model, *, data=None, scales=(1.0,)):
    """A run folder as training leaves it, with a checkpoint per scale: 10, 20, ..."""
    checkpoints = str(folder / "checkpoints")
    place = Checkpoint(directory=checkpoints)
    config = Config(model=model.config, data=data or Data(), checkpoint=place)
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    store = open_store(place)
    for number, scale in enumerate(scales, start=1):
        parts = {
            "params": jax.tree.map(lambda x, scale=scale: scale * x, params),
            "rest": {"step": jnp.int32(10 * number)},
        }
        store.save(10 * number, parts, {"data": "opaque"})
    store.close()
    return folder


def write_tokenizer(folder):
    """Three words and an end, as the `tokenizers` package writes them."""
    vocabulary = {"<eos>": 0, "alpha": 1, "beta": 2, "gamma": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<eos>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


def same_params(one, other):
    left, right = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (one, other))
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def logits(model):
    """They do not see the padding of the vocabulary, which may change."""
    tokens = jnp.arange(12).reshape(2, 6)
    return jax.jit(lambda model: model(tokens))(model)


def test_run_to_hugging_face_and_back(tmp_path):
    model = decoder()
    run = write_run(tmp_path / "run", model, scales=(3.0, 1.0))
    line = convert(run, tmp_path / "hf")
    num_params = sum(x.size for x in jax.tree.leaves(model))
    assert line == (
        f"wrote {tmp_path / 'hf'}: a Hugging Face folder with step 20 of {run}, "
        f"{num_params:,} parameters"
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"]
    exported, tokenizer, _ = load_model(tmp_path / "hf")
    np.testing.assert_array_equal(logits(exported), logits(model))
    assert isinstance(tokenizer, ByteTokenizer)

    line = convert(tmp_path / "hf", tmp_path / "again")
    assert line.startswith(
        f"wrote {tmp_path / 'again'}: a run folder with a checkpoint"
    )
    again, tokenizer, config = load_model(tmp_path / "again")
    np.testing.assert_array_equal(logits(again), logits(model))
    assert config == from_json((tmp_path / "again/config.json").read_text())
    assert config.model == again.config
    assert isinstance(tokenizer, ByteTokenizer)


@pytest.mark.parametrize("kind", ["run", "hugging face"])
def test_to_a_quantized_folder(kind, tmp_path):
    model, source = decoder(), tmp_path / "source"
    if kind == "run":
        write_run(source, model)
    else:
        save_pretrained(model, source)
        write_tokenizer(source)
    target = tmp_path / "packed"
    line = convert(source, target, format="int4", group=128)
    size = (target / "quantized.safetensors").stat().st_size
    assert line.startswith(f"wrote {target}: ") and f"in int4, {size:,} bytes" in line
    found, tokenizer, config = load_model(target)
    assert found.config.attention == model.config.attention
    assert config.checkpoint == Checkpoint()
    assert isinstance(
        tokenizer, ByteTokenizer if kind == "run" else HuggingFaceTokenizer
    )
    expected = quantize(load_model(source)[0], "int4", group=128)
    leaves = jax.tree.leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_quantized_folders_that_are_refused(tmp_path):
    run, packed = write_run(tmp_path / "run", decoder()), tmp_path / "packed"
    convert(run, packed, format="fp6_e2m3")
    with pytest.raises(ValueError, match="holds quantized weights; convert the folder"):
        convert(packed, tmp_path / "again")
    written = (packed / "config.json").read_text()
    (packed / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="or its writing was interrupted"):
        load_model(packed)
    config = from_json(written)
    other = dataclasses.replace(config.model, feed_forward=FeedForwardConfig(48))
    text = to_json(dataclasses.replace(config, model=other))
    (packed / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"down is \(2, 32, 16\), the model needs \(2, 48"
    ):
        load_model(packed)
    (packed / "quantized.safetensors").write_bytes(b"not")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load_model(packed)


def test_run_loads_into_tensor_parallel_shards(tmp_path):
    model = decoder()
    run = write_run(tmp_path / "run", model)
    mesh = make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    loaded, _, config = load_model(run, mesh)
    assert same_params(loaded, model)
    assert config.checkpoint.directory == str(run / "checkpoints")
    query = loaded.layers.attention.query[...]  # [L, D, H, K], two heads
    assert query.sharding.mesh == mesh
    assert [shard.data.shape for shard in query.addressable_shards] == [
        (2, 16, 1, 8)
    ] * 2
    with pytest.raises(ValueError, match="does not divide dim 'heads'"):
        load_model(run, make_mesh(data=1, tensor=8))


def test_dtype_of_loaded_parameters(tmp_path):
    model = decoder()
    run = write_run(tmp_path / "run", model)
    loaded, _, _ = load_model(run, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(loaded))
    assert same_params(loaded, rounded)


def test_moved_run_uses_its_own_checkpoints(tmp_path):
    write_run(tmp_path / "run", decoder())
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert same_params(load_model(moved)[0], decoder())


def test_checkpoints_may_lie_elsewhere(tmp_path):
    run = write_run(tmp_path / "run", decoder())
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    config = from_json((run / "config.json").read_text())
    text = to_json(config).replace(str(run / "checkpoints"), str(elsewhere))
    (run / "config.json").write_text(text)
    assert same_params(load_model(run)[0], decoder())


def test_tokenizer_goes_along(tmp_path):
    named = tmp_path / "tokenizer"
    named.mkdir()
    write_tokenizer(named)
    run = write_run(
        tmp_path / "run", decoder(vocab_size=8), data=Data(tokenizer=str(named))
    )
    line = convert(run, tmp_path / "hf")
    assert line.endswith("parameters and its tokenizer")
    convert(tmp_path / "hf", tmp_path / "again")
    moved = (tmp_path / "again").rename(tmp_path / "moved")
    for folder in (run, tmp_path / "hf", moved):
        _, tokenizer, config = load_model(folder)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert tokenizer.encode("gamma alpha").tolist() == [3, 1]
        assert tokenizer.end_of_document == 0
        assert config.data.tokenizer is not None


def test_model_without_tokenizer_takes_ids(tmp_path):
    save_pretrained(decoder(vocab_size=40), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run")
    for folder in (tmp_path / "hf", tmp_path / "run"):
        _, tokenizer, _ = load_model(folder)
        assert tokenizer == BareIds(40)


def test_target_must_be_empty(tmp_path):
    run = write_run(tmp_path / "run", decoder())
    (tmp_path / "file").touch()
    for target in (run, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            convert(run, target)
    (tmp_path / "empty").mkdir()
    convert(run, tmp_path / "empty")


def test_model_that_no_family_holds_leaves_nothing_behind(tmp_path):
    model = decoder()
    odd = dataclasses.replace(model.config, embedding_norm=True)
    run = write_run(tmp_path / "run", Decoder(odd, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="none of the families"):
        convert(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_source_must_be_a_model(tmp_path):
    target = tmp_path / "target"

    def fails(error, message):
        with pytest.raises(error, match=message):
            convert(tmp_path / "source", target)
        assert not target.exists()

    fails(FileNotFoundError, "there is no folder .*source; give a run's folder or")
    (tmp_path / "source").mkdir()
    fails(FileNotFoundError, r"source has no config.json; neither a run's folder nor")
    file = tmp_path / "source/config.json"
    file.write_text("{")
    fails(ValueError, "config.json is not JSON")
    file.write_text("[]")
    fails(ValueError, r"is neither of a run \(it would have a key 'model'\)")
    file.write_text('{"model": {"depth": 3}}')
    fails(ValueError, "config.json: .*depth")
    file.write_text(to_json(Config()))
    fails(FileNotFoundError, "the run in .*source has no checkpoints")
    (tmp_path / "source/checkpoints").mkdir()
    fails(FileNotFoundError, "the run in .*source has saved no checkpoint yet")
