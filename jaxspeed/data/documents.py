"""Documents of text, JSONL and token files, read piece by piece.

A file is never read whole and never scanned ahead: it is cut, by its size alone, into
pieces of fixed length that can be read in any order. So a corpus of any size opens at
once and resumes at once, whatever the memory. A JSONL line belongs to the piece in
which it starts. A text or token document longer than a piece goes on in the next piece
as a new document; a piece is many rows long, and rows cut documents anyway.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from jaxspeed.data.tokenizer import Ids, Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """From `start` to `stop` in a file of `size`: bytes, or ids in a token file.

    The unit of reading and shuffling.
    """

    path: str
    start: int
    stop: int
    size: int


Reader = Callable[[Piece], list[Ids]]
"""From a piece to its documents, each int32 [S], in the order of the file."""


def read_text(piece: Piece, tokenizer: Tokenizer) -> list[Ids]:
    """The piece of a text file: one document, ended where the file ends.

    Raises:
        ValueError: the file is not UTF-8, or was cut since it was opened.
    """
    with open(piece.path, "rb") as file:
        start = _character_start(file, piece.start)
        stop = _character_start(file, piece.stop)
        file.seek(start)
        content = file.read(stop - start)
    if len(content) < stop - start:
        raise ValueError(
            f"{piece.path!r} had {piece.size} bytes when it was opened and has fewer "
            "now; data files must not change while they are read"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{piece.path!r} is not UTF-8 text: byte {start + error.start} is "
            f"0x{content[error.start]:02x}. Convert the file, or leave it out (paths "
            "may be globs, such as 'folder/**/*.txt')"
        ) from error
    ids = tokenizer.encode(text)
    return [_end(ids, tokenizer) if stop == piece.size else ids]


def read_jsonl(piece: Piece, tokenizer: Tokenizer, field: str) -> list[Ids]:
    """The text in `field` of every line that starts in the piece: one document each.

    Raises:
        ValueError: a line is not a JSON object with text in `field`.
    """
    documents = []
    with open(piece.path, "rb") as file:
        if piece.start:
            # One byte back: if it is a newline, a line starts at `start` itself. The
            # limit keeps a line of many pieces from being read once for each.
            file.seek(piece.start - 1)
            file.readline(piece.stop - piece.start + 1)
        while (start := file.tell()) < piece.stop:
            line = file.readline()
            try:
                text = _text_field(line, field)
            except ValueError as error:
                number = _line_number(file, start)
                raise ValueError(f"{piece.path!r}, line {number}: {error}") from error
            documents.append(_end(tokenizer.encode(text), tokenizer))
    return documents


def read_tokens(piece: Piece, tokenizer: Tokenizer, dtype: str) -> list[Ids]:
    """The ids of the piece, cut after every `tokenizer.end_of_document`.

    A piece reads one id into the next, so that the pair at the cut is not lost.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    array = open_tokens(piece.path, dtype)
    ids = np.asarray(array[piece.start : piece.stop + 1])
    outside = (ids < 0) | (ids >= tokenizer.vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise ValueError(
            f"{piece.path!r}: id {ids[position]} at position {piece.start + position} "
            f"is outside the vocabulary of {tokenizer.vocab_size}; name the tokenizer "
            "that wrote the file, or give its vocab_size (and check token_dtype)"
        )
    ids = ids.astype(np.int32)
    if tokenizer.end_of_document is None:
        return [ids]
    ends = np.flatnonzero(ids == tokenizer.end_of_document) + 1
    return np.split(ids, ends)


def open_tokens(path: str, dtype: str) -> np.ndarray:
    """Maps a token file into memory: `.npy`, or raw ids of `dtype` in any other file.

    Raises:
        ValueError: the file does not hold one line of integers.
    """
    if not path.endswith(".npy"):
        try:
            return np.memmap(path, np.dtype(dtype), mode="r")
        except ValueError as error:
            raise ValueError(
                f"{path!r} is not a whole number of {dtype} ids ({error}); set "
                "token_dtype to the type that the file was written with"
            ) from error
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path!r} is not a valid .npy file: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path!r} holds {array.dtype} of shape {array.shape}; a token file holds "
            "integers in one dim"
        )
    return array


def _end(ids: Ids, tokenizer: Tokenizer) -> Ids:
    if tokenizer.end_of_document is None:
        return ids
    return np.append(ids, np.int32(tokenizer.end_of_document))


def _character_start(file: BinaryIO, offset: int) -> int:
    """The first offset from `offset` on that is not inside a UTF-8 character."""
    file.seek(offset)
    # A character has at most three bytes after its first; they are 10xxxxxx.
    inside = [byte & 0xC0 == 0x80 for byte in file.read(3)]
    return offset + (inside.index(False) if False in inside else len(inside))


def _text_field(line: bytes, field: str) -> str:
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ValueError(f"byte {error.start} (0x{byte:02x}) is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object with {field!r}")
    if field not in record:
        raise ValueError(f"no field {field!r}; its fields are {sorted(record)}")
    text = record[field]
    if not isinstance(text, str) or not text:
        given = "empty" if text == "" else f"a {type(text).__name__}"
        raise ValueError(f"field {field!r} is {given}; it must be text, not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} has half of a surrogate pair at character {error.start}"
        ) from error
    return text


def _line_number(file: BinaryIO, offset: int) -> int:
    """The number, from 1, of the line that starts at `offset`."""
    file.seek(0)
    newlines = 0
    while file.tell() < offset:
        newlines += file.read(min(2**20, offset - file.tell())).count(b"\n")
    return newlines + 1
