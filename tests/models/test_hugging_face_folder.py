"""Folders that are malformed, unusual, or being written when something fails."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspeed.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
    from_pretrained,
    save_pretrained,
)
from jaxspeed.models.hugging_face import folder as folder_files

LLAMA = DecoderConfig(
    vocab_size=11,
    dim=8,
    num_layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4),
    feed_forward=FeedForwardConfig(hidden_dim=12),
)
GPT2 = DecoderConfig(
    vocab_size=11,
    dim=8,
    num_layers=2,
    attention=AttentionConfig(2, 2, 4, qkv_bias=True, out_bias=True),
    feed_forward=FeedForwardConfig(12, "gelu_tanh", gated=False, bias=True),
    norm=NormConfig("layer"),
    position=PositionConfig("learned", 16),
    tied=True,
)
TENSORS_BYTES = 4 * (2 * 11 * 8 + 8 + 2 * (2 * 8 + 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12))
"""Of LLAMA in float32: two tables, the last norm, and two layers."""


def decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A small decoder with random weights."""
    return Decoder(config, rngs=nnx.Rngs(params=seed))


@pytest.fixture
def llama(tmp_path) -> Path:
    """A good folder."""
    save_pretrained(decoder(LLAMA), tmp_path)
    return tmp_path


def edit_json(file: Path, **changes) -> None:
    """Sets keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    """Rewrites the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_same(a: Decoder, b: Decoder) -> None:
    """Equal configurations but for padding, and equal parameters."""
    for x, y in zip(
        jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def padding_is_zero(model: Decoder) -> Decoder:
    """The model as it comes back from a file."""
    size = model.config.vocab_size
    model.embedding.tokens[...] = model.embedding.tokens[...].at[size:].set(0)
    if model.head.projection is not None:
        projection = model.head.projection[...].at[:, size:].set(0)
        model.head.projection[...] = projection
    return model


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder.*nothing is"):
        from_pretrained(tmp_path / "absent")


def test_no_config(llama):
    (llama / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        from_pretrained(llama)


@pytest.mark.parametrize("text", ["{not json", "", "\xff\xfe"])
def test_malformed_config(llama, text):
    (llama / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        from_pretrained(llama)


def test_config_that_is_not_an_object(llama):
    (llama / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"holds a list, not a JSON object"):
        from_pretrained(llama)


def test_unsupported_config_names_the_file(llama):
    edit_json(llama / "config.json", model_type="mamba")
    with pytest.raises(ValueError, match=r"config.json: model_type is 'mamba'"):
        from_pretrained(llama)


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        from_pretrained(llama)


def test_pickled_weights_are_never_read(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*Convert them"):
        from_pretrained(llama)


@pytest.mark.parametrize("keep", [4, 300, -10])
def test_truncated_file(llama, keep):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not a"):
        from_pretrained(llama)


def test_missing_tensor(llama):
    edit_tensors(llama, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"1 tensors are missing: \['model.layers.1.ml"
    ):
        from_pretrained(llama)


def test_missing_output_projection(llama):
    edit_tensors(llama, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(
        ValueError, match=r"lm_head.weight.*tie_word_embeddings to true"
    ):
        from_pretrained(llama)


def test_unknown_tensor(llama):
    edit_tensors(llama, lambda t: t.update({"score.weight": np.ones((2, 8))}))
    with pytest.raises(
        ValueError, match=r"not part of the model.*'model.score.weight'"
    ):
        from_pretrained(llama)


def test_layers_that_config_does_not_have(llama):
    edit_json(llama / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"9 tensors are not part of the model"):
        from_pretrained(llama)


def test_wrong_shape(llama):
    edit_json(llama / "config.json", intermediate_size=13)
    message = r"'model.layers.0.mlp.*' has shape \(8, 12\), but .* makes it \(8, 13\)"
    with pytest.raises(ValueError, match=message):
        from_pretrained(llama)


def test_quantized_tensor(llama):
    def quantize(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    edit_tensors(llama, quantize)
    with pytest.raises(ValueError, match=r"'model.norm.weight' has dtype I8"):
        from_pretrained(llama)


def test_tensor_with_and_without_prefix(llama):
    edit_tensors(llama, lambda t: t.update({"norm.weight": np.ones(8)}))
    with pytest.raises(ValueError, match=r"'model.norm.weight' is there with and with"):
        from_pretrained(llama)


def test_buffers_are_ignored_and_the_prefix_may_be_absent(tmp_path):
    model = padding_is_zero(decoder(GPT2))
    save_pretrained(model, tmp_path)

    def as_in_old_files(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])

    edit_tensors(tmp_path, as_in_old_files)
    assert_same(from_pretrained(tmp_path), model)


def test_tied_table_present_twice(tmp_path):
    model = padding_is_zero(decoder(GPT2))
    save_pretrained(model, tmp_path)
    table = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    assert_same(from_pretrained(tmp_path), model)
    edit_tensors(tmp_path, lambda t: t.pop("transformer.wte.weight"))
    assert_same(from_pretrained(tmp_path), model)
    edit_tensors(tmp_path, lambda t: t.update({"transformer.wte.weight": table + 1}))
    with pytest.raises(ValueError, match=r"differs from 'transformer.wte.weight'; set"):
        from_pretrained(tmp_path)


@pytest.fixture
def parts(tmp_path) -> Path:
    """A good folder with several files."""
    save_pretrained(decoder(LLAMA), tmp_path, max_shard_bytes=1000)
    return tmp_path


def index_of(folder: Path) -> dict:
    """The folder's index."""
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_parts_and_their_index(parts):
    index = index_of(parts)
    assert index["metadata"] == {"total_size": TENSORS_BYTES}
    names = sorted(file.name for file in parts.glob("*.safetensors"))
    assert names == sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    for name in names:
        held = load_file(parts / name)
        assert sum(array.nbytes for array in held.values()) <= 1000
        assert all(index["weight_map"][tensor] == name for tensor in held)
    assert_same(from_pretrained(parts), padding_is_zero(decoder(LLAMA)))


def test_missing_part(parts):
    next(parts.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-.* not there"):
        from_pretrained(parts)


def test_index_that_does_not_fit_its_files(parts):
    where = index_of(parts)["weight_map"]
    first, last = min(where.values()), max(where.values())
    moved = {k: last if v == first else v for k, v in where.items()}
    edit_json(parts / "model.safetensors.index.json", weight_map=moved)
    with pytest.raises(ValueError, match=r"which does not hold it"):
        from_pretrained(parts)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a.bin"])
def test_index_that_points_elsewhere(parts, name):
    edit_json(parts / "model.safetensors.index.json", weight_map={"a": name})
    with pytest.raises(ValueError, match=r"may only name safetensors files"):
        from_pretrained(parts)


def test_index_without_a_map(parts):
    edit_json(parts / "model.safetensors.index.json", weight_map=["a"])
    with pytest.raises(ValueError, match=r"has no weight_map"):
        from_pretrained(parts)


def test_saving_replaces_the_model_and_nothing_else(parts):
    (parts / "tokenizer.json").write_text("{}")
    other = padding_is_zero(decoder(LLAMA, seed=1))
    params = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    save_pretrained(params, parts, LLAMA)
    names = sorted(file.name for file in parts.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(from_pretrained(parts), other)


def test_failure_while_writing_leaves_the_old_model(llama, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxspeed.models.hugging_face.save.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(decoder(LLAMA, seed=1), llama)
    assert_same(from_pretrained(llama), padding_is_zero(decoder(LLAMA)))
    assert not (llama / ".incoming").exists()


@pytest.mark.parametrize("survived", range(5))
def test_a_crash_never_leaves_a_mixture(parts, monkeypatch, survived):
    """Dies at each of the first steps of replacing the files, then saves again."""

    class Killed(BaseException):
        pass

    renames = iter(range(survived))
    rename = Path.rename

    def dying(self, target):
        if next(renames, None) is None:
            raise Killed
        return rename(self, target)

    other = padding_is_zero(decoder(LLAMA, seed=1))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        patched.setattr(shutil, "rmtree", lambda _: None)  # nor does it clean up
        with pytest.raises(Killed):
            save_pretrained(other, parts, max_shard_bytes=1500)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        from_pretrained(parts)
    save_pretrained(other, parts)
    assert_same(from_pretrained(parts), other)


def test_dtypes_that_can_be_written(llama):
    model = padding_is_zero(decoder(LLAMA))
    save_pretrained(model, llama, dtype=jnp.bfloat16)
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(model)
    )
    nnx.update(model, rounded)
    assert_same(from_pretrained(llama), model)
    with pytest.raises(ValueError, match=r"as float64; pass dtype= one of \['float32'"):
        save_pretrained(model, llama, dtype=np.float64)


def test_parameters_need_their_architecture(tmp_path):
    params = nnx.to_pure_dict(nnx.state(decoder(LLAMA), nnx.Param))
    with pytest.raises(ValueError, match="pass config="):
        save_pretrained(params, tmp_path)
    with pytest.raises(ValueError, match=r"does not describe these parameters \("):
        save_pretrained(params, tmp_path, GPT2)
    assert not list(tmp_path.iterdir())


def test_header_of_a_written_file_is_aligned(llama):
    raw = (llama / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    assert len(raw) == 8 + length + TENSORS_BYTES
    assert header["model.norm.weight"]["shape"] == [8]
    assert set(folder_files.DTYPES.values()) >= {
        each["dtype"] for name, each in header.items() if name != "__metadata__"
    }
