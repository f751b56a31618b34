"""Pieces of text, JSONL and token files, and what is said of malformed ones."""

import json

import numpy as np
import pytest

from jaxspeed.data.documents import (
    Piece,
    open_tokens,
    read_jsonl,
    read_text,
    read_tokens,
)
from jaxspeed.data.tokenizer import BareIds, ByteTokenizer

BYTES = ByteTokenizer()


def pieces(path, length, size=None):
    size = path.stat().st_size if size is None else size
    return [
        Piece(str(path), start, min(start + length, size), size)
        for start in range(0, size, length)
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 100])
def test_text_is_cut_between_characters(tmp_path, length):
    text = "añ€🎉b🎉🎉"
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    read = [read_text(piece, BYTES)[0] for piece in pieces(path, length)]
    decoded = [BYTES.decode(ids) for ids in read]
    assert "".join(decoded) == text
    assert "\ufffd" not in "".join(decoded)
    ended = np.concatenate(read)
    assert ended[len(text.encode())] == 256 and 256 not in ended[: len(text.encode())]


def test_text_errors(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 noir")
    whole = pieces(path, 100)[0]
    with pytest.raises(ValueError, match=r"latin.txt' is not UTF-8 .* byte 3 is 0xe9"):
        read_text(whole, BYTES)
    path.write_bytes(b"abcd")
    with pytest.raises(ValueError, match=r"latin.txt' had 9 bytes .* has fewer"):
        read_text(whole, BYTES)


@pytest.mark.parametrize("last", ["", "\n"])
@pytest.mark.parametrize("length", [*range(1, 30), 1000])
def test_jsonl_lines_belong_to_one_piece(tmp_path, length, last):
    texts = ["one", "zwei €", "3", "a much longer line than others", "five\nlines"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": 1, "body": t}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join(lines) + last, encoding="utf-8")
    read = [
        ids
        for piece in pieces(path, length)
        for ids in read_jsonl(piece, BYTES, "body")
    ]
    assert [BYTES.decode(ids) for ids in read] == texts
    assert all(ids[-1] == 256 for ids in read)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "the line is empty"),
        (b'{"text": "a"', r"not JSON, .* at column \d+"),
        (b'{"text": "\xe9"}', r"byte 10 \(0xe9\) is not UTF-8"),
        (b'["a"]', "is a list, not an object with 'text'"),
        (b'{"txt": "a", "id": 3}', r"no field 'text'; its fields are \['id', 'txt'\]"),
        (b'{"text": 3}', "field 'text' is a int; it must be text"),
        (b'{"text": ""}', "field 'text' is empty"),
        (
            b'{"text": "\\ud800"}',
            "field 'text' has half of a surrogate pair",
        ),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"bad.jsonl', line 3: " + message):
        for piece in pieces(path, 20):
            read_jsonl(piece, BYTES, "text")


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_tokens_end_with_the_id(tmp_path, kind):
    ids = np.array([5, 6, 9, 7, 9, 9, 8, 4], np.uint16)
    path = tmp_path / f"a.{kind}"
    np.save(path, ids) if kind == "npy" else ids.tofile(path)
    tokenizer = BareIds(10, end_of_document=9)
    (whole,) = pieces(path, 100, size=8)
    read = read_tokens(whole, tokenizer, "uint16")
    assert [document.tolist() for document in read] == [[5, 6, 9], [7, 9], [9], [8, 4]]
    assert all(document.dtype == np.int32 for document in read)
    stream = read_tokens(whole, BareIds(10), "uint16")
    assert [document.tolist() for document in stream] == [ids.tolist()]
    # A piece reads one id on, so that the pairs (6, 9) and (8, 4) are not lost.
    halves = [read_tokens(p, tokenizer, "uint16") for p in pieces(path, 2, size=8)]
    assert [[d.tolist() for d in half] for half in halves] == [
        [[5, 6, 9], []],
        [[9], [7, 9], []],
        [[9], [9], [8]],
        [[8, 4]],
    ]


def test_token_errors(tmp_path):
    path = tmp_path / "a.bin"
    np.array([5, 300, 6], np.uint16).tofile(path)
    message = r"a.bin': id 300 at position 1 is outside the vocabulary of 257"
    with pytest.raises(ValueError, match=message):
        read_tokens(Piece(str(path), 0, 3, 3), BYTES, "uint16")
    with pytest.raises(ValueError, match=r"a.bin' is not a whole number of int32 ids"):
        open_tokens(str(path), "int32")
    path = tmp_path / "a.npy"
    path.write_bytes(b"no array at all")
    with pytest.raises(ValueError, match=r"a.npy' is not a valid .npy file"):
        open_tokens(str(path), "uint16")
    for array in (np.zeros(3), np.zeros((2, 2), np.int32)):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"a.npy' holds .* integers in one dim"):
            open_tokens(str(path), "uint16")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a.npy' is not a valid .npy file"):
        open_tokens(str(path), "uint16")
