"""Tokenizers and streaming of text."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxspeed.data import (
    BareIds,
    ByteTokenizer,
    HuggingFaceTokenizer,
    TextStream,
    load_tokenizer,
)

TEXT = "naïve €5 🎉 déjà vu"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE that asks for truncation and a token at the start."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the thing that thinks the thought"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(3)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_bytes():
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("aé")
    np.testing.assert_array_equal(ids, [97, 0xC3, 0xA9])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(tokenizer.encode(b"\xff\x00"), [255, 0])
    assert tokenizer.decode([97, 256, 0xC3, 0xA9, 0xC3]) == "aé\ufffd"
    assert tokenizer.decode([]) == ""
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    with pytest.raises(ValueError, match=r"ids from 3 to 257 do not fit .* 257"):
        tokenizer.decode([3, 257])


def test_bare_ids():
    tokenizer = BareIds(vocab_size=1000, end_of_document=999)
    np.testing.assert_array_equal(tokenizer.encode("17 4 999"), [17, 4, 999])
    assert tokenizer.decode(np.array([17, 4])) == " 17 4"
    with pytest.raises(ValueError, match="to 1000 do not fit a vocabulary of 1000"):
        tokenizer.encode("1000")
    with pytest.raises(ValueError, match="end_of_document=1000 is not in"):
        BareIds(vocab_size=1000, end_of_document=1000)


def test_hugging_face_adds_and_cuts_nothing(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    text = "the thing thinks " * 20
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) > 20
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.decode([*tokenizer.encode("the"), 1]) == "the"
    assert ids.max() < tokenizer.vocab_size <= 300


def test_hugging_face_end_of_document(tokenizer_folder, tmp_path):
    file = tokenizer_folder / "tokenizer.json"
    assert HuggingFaceTokenizer(file).end_of_document == 1  # </s>
    assert HuggingFaceTokenizer(file, end_of_document=7).end_of_document == 7
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for token in ("<end>", {"content": "<end>"}):
        config.write_text(json.dumps({"eos_token": token}))
        assert HuggingFaceTokenizer(tmp_path).end_of_document == 2
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is not valid"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(ValueError, match="end_of_document=300 is not in"):
        HuggingFaceTokenizer(file, end_of_document=300)


def test_hugging_face_vocabulary_with_holes(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert HuggingFaceTokenizer(tmp_path).vocab_size == 10
    assert HuggingFaceTokenizer(tmp_path).end_of_document is None


def test_hugging_face_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer.json"):
        load_tokenizer(str(tmp_path))
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model": 3')
    with pytest.raises(ValueError, match=r"tokenizer.json' is not a tokenizer of"):
        load_tokenizer(str(broken))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxspeed\[hf\]'"):
        load_tokenizer(str(broken))


def test_digests_differ(tokenizer_folder):
    file = tokenizer_folder / "tokenizer.json"
    tokenizers = [
        ByteTokenizer(),
        BareIds(257, 256),
        BareIds(257),
        HuggingFaceTokenizer(file),
        HuggingFaceTokenizer(file, end_of_document=7),
    ]
    assert len({tokenizer.digest for tokenizer in tokenizers}) == len(tokenizers)


def test_stream_holds_back_half_a_character():
    stream = TextStream(ByteTokenizer())
    assert stream.push([ord("a"), 0xE2]) == ""
    assert stream.push([0x82]) == ""
    assert stream.push([0xAC]) == "a€"
    assert stream.push(b"b") == "b"
    assert stream.push([256]) == ""
    assert stream.push([0xC3]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stream_equals_whole_decoding(size, tokenizer_folder):
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(tokenizer_folder))):
        ids = tokenizer.encode(TEXT)
        stream = TextStream(tokenizer)
        parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(parts) + stream.finish() == TEXT
        assert "\ufffd" not in "".join(parts)
    invalid = [0xFF, 0xE2, 0x82, 65, 0x80, 0x80, 66]
    stream = TextStream(ByteTokenizer())
    parts = [stream.push([token]) for token in invalid]
    assert "".join(parts) == ByteTokenizer().decode(invalid)
