"""Which documents are for training and which are held out: options to file pieces."""

import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from jaxspeed.data import documents
from jaxspeed.data.documents import Piece, Reader
from jaxspeed.data.standard_library import standard_library
from jaxspeed.data.tokenizer import (
    BareIds,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Ids,
    Tokenizer,
)

_SUFFIXES = {
    "text": (),
    "jsonl": (".jsonl", ".ndjson"),
    "tokenized": (".npy", ".bin"),
}
SOURCES = ("standard_library", *_SUFFIXES)
MIN_PIECE = 2**16
"""Least length of a piece, in bytes of text or in ids; at least 16 rows, too."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where tokens come from.

    Attributes:
        source: "standard_library" (Python's own source, nothing to download), "text"
            (a file is a document), "jsonl" (a line is), or "tokenized" (.npy, or raw
            ids in .bin; a document ends with the end-of-document id).
        paths: files, folders (searched to any depth for the source's suffix; all
            visible files for text) or globs.
        held_out_paths: likewise, for evaluation.
        held_out_fraction: without `held_out_paths`, the share that is held out: of the
            files of the standard library, else of pieces of 64 Ki bytes or ids (more
            for long sequences), so of whole files where they are smaller. 0 to 0.5.
        tokenizer: a Hugging Face tokenizer.json, or its folder; None for bytes. For
            "tokenized", the one that wrote the files.
        vocab_size: "tokenized" only, instead of a tokenizer that is not at hand.
        end_of_document: overrides the tokenizer's own id.
        token_dtype: type of the ids in .bin files.
        field: name of the text in a JSONL record.
        sequence_length: S, tokens in a row.
        shuffle: a new order in every epoch; otherwise the order of the files.
        seed: of that order, 0 to 2**32 - 1.
    """

    source: str = "standard_library"
    paths: tuple[str, ...] = ()
    held_out_paths: tuple[str, ...] = ()
    held_out_fraction: float = 0.0625
    tokenizer: str | None = None
    vocab_size: int | None = None
    end_of_document: int | None = None
    token_dtype: str = "uint16"
    field: str = "text"
    sequence_length: int = 256
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}; sources are {SOURCES}")
        if isinstance(self.paths, str) or isinstance(self.held_out_paths, str):
            raise ValueError(
                "paths and held_out_paths are tuples of strings; write "
                f"({self.paths or self.held_out_paths!r},)"
            )
        given = bool(self.paths or self.held_out_paths)
        if self.source == "standard_library" and given:
            raise ValueError(
                "source='standard_library' takes no paths; set source to one of "
                f"{SOURCES[1:]} to read {self.paths or self.held_out_paths}"
            )
        if self.source != "standard_library" and not self.paths:
            raise ValueError(f"source={self.source!r} needs paths")
        if self.vocab_size is not None and (
            self.source != "tokenized" or self.tokenizer is not None
        ):
            raise ValueError(
                f"vocab_size={self.vocab_size} is for source='tokenized' without a "
                "tokenizer; otherwise the tokenizer sets it"
            )
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length={self.sequence_length} is not positive")
        if not 0 <= self.held_out_fraction <= 0.5:
            raise ValueError(
                f"held_out_fraction={self.held_out_fraction} is not in [0, 0.5]"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is not in [0, 2**32)")
        if not _is_integer(self.token_dtype):
            raise ValueError(
                f"token_dtype={self.token_dtype!r} is no integer type; use 'uint16', "
                "'int32', ..."
            )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of these data; its `vocab_size` is the model's."""
        if self.vocab_size is not None:
            return BareIds(self.vocab_size, self.end_of_document)
        if self.tokenizer is not None:
            return HuggingFaceTokenizer(self.tokenizer, self.end_of_document)
        if self.end_of_document not in (None, ByteTokenizer.end_of_document):
            raise ValueError(
                f"end_of_document={self.end_of_document}: the byte tokenizer ends "
                f"documents with {ByteTokenizer.end_of_document}; name the tokenizer "
                "or vocab_size that goes with this id"
            )
        return ByteTokenizer()


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Pieces of files in a fixed order, read when indexed: a data source for grain.

    Attributes:
        files: their paths.
        sizes: of each file, bytes or ids.
        piece_length: bytes or ids in a piece.
        read: from a piece to its documents.
        split_every: 0 for all pieces; n if every n-th piece of all is held out.
        held_out: with `split_every`, whether this is the held-out part.
    """

    files: tuple[str, ...]
    sizes: Int64[np.ndarray, " files"]
    piece_length: int
    read: Reader
    split_every: int = 0
    held_out: bool = False

    def __len__(self) -> int:
        num_pieces = int(_num_pieces(self.sizes, self.piece_length).sum())
        if not self.split_every:
            return num_pieces
        num_held_out = num_pieces // self.split_every
        return num_held_out if self.held_out else num_pieces - num_held_out

    def __getitem__(self, index: int) -> list[Ids]:
        number = self._number(int(index))
        file = int(np.searchsorted(self._first_pieces, number, side="right")) - 1
        start = (number - int(self._first_pieces[file])) * self.piece_length
        size = int(self.sizes[file])
        stop = min(start + self.piece_length, size)
        piece = Piece(self.files[file], start, stop, size)
        found = self.read(piece)
        # None at all is the inside of a long JSONL line; the end of a file may hold
        # one id. Otherwise such files would be read for ever, and give no row.
        last = piece.start > 0 and piece.stop == size
        if found and not last and max(map(len, found)) < 2:
            raise ValueError(
                f"{piece.path!r} has no document of two ids or more from position "
                f"{piece.start} to {piece.stop}, so nothing to predict; remove it"
            )
        return found

    def _number(self, index: int) -> int:
        """The number, over all files, of piece `index` of this corpus."""
        if not self.split_every:
            return index
        if self.held_out:
            return (index + 1) * self.split_every - 1
        return index + index // (self.split_every - 1)

    @functools.cached_property
    def _first_pieces(self) -> np.ndarray:
        num_pieces = _num_pieces(self.sizes, self.piece_length)
        return np.cumsum(num_pieces) - num_pieces

    @property
    def length(self) -> int:
        """An upper estimate of its tokens, found without reading."""
        return min(int(self.sizes.sum()), len(self) * self.piece_length)

    @property
    def digest(self) -> str:
        """Identifies its files, by name and size, and which pieces of them."""
        names = [os.path.basename(file) for file in self.files]
        pieces = (self.piece_length, self.split_every, self.held_out)
        content = repr((names, self.sizes.tolist(), pieces))
        return hashlib.sha256(content.encode()).hexdigest()


def open_corpora(data: Data, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """The corpus for training and the held-out one, which may be empty.

    Raises:
        FileNotFoundError: a path matches no file.
        ValueError: a file is empty or malformed, or is in both.
    """
    if data.source == "standard_library":
        files, held_out = standard_library(data.held_out_fraction)
    else:
        files = find_files(data.paths, data.source)
        held_out = find_files(data.held_out_paths, data.source)
        shared = set(map(os.path.realpath, files)) & set(
            map(os.path.realpath, held_out)
        )
        if shared:
            raise ValueError(f"both for training and held out: {sorted(shared)}")
    train = _open(data, tokenizer, files)
    if held_out or data.source == "standard_library":
        return train, _open(data, tokenizer, held_out)
    # Every n-th piece of a corpus that is large enough; else the last of several.
    num_pieces = len(train)
    if data.held_out_fraction and num_pieces > 1:
        every = min(round(1 / data.held_out_fraction), num_pieces)
    else:
        every = num_pieces + 1
    train = dataclasses.replace(train, split_every=every)
    return train, dataclasses.replace(train, held_out=True)


def find_files(paths: Sequence[str], source: str) -> tuple[str, ...]:
    """The files that `paths` name (files, folders, globs), sorted, none twice.

    Raises:
        FileNotFoundError: a path matches no file.
        ValueError: a file is empty.
    """
    found = set()
    for path in paths:
        if os.path.isdir(path):
            matches = _files_below(path, _SUFFIXES[source])
        else:
            matches = [path] if os.path.isfile(path) else _matches(path)
        if not matches:
            suffixes = " or ".join(_SUFFIXES[source]) or "visible"
            problem = f"has no {suffixes} file" if os.path.isdir(path) else "is no file"
            raise FileNotFoundError(f"{path!r} {problem}; source is {source!r}")
        found.update(map(os.path.normpath, matches))
    files = tuple(sorted(found))
    for file in files:
        if os.path.getsize(file) == 0:
            raise ValueError(f"{file!r} is empty; remove it, or name the other files")
    return files


def _matches(pattern: str) -> list[str]:
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def _files_below(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                found.append(os.path.join(parent, name))
    return found


def _open(data: Data, tokenizer: Tokenizer, files: tuple[str, ...]) -> Corpus:
    if data.source == "tokenized":
        read = functools.partial(documents.read_tokens, dtype=data.token_dtype)
        lengths = [len(documents.open_tokens(file, data.token_dtype)) for file in files]
        if 0 in lengths:
            raise ValueError(f"{files[lengths.index(0)]!r} is empty: it holds no ids")
    else:
        lengths = [os.path.getsize(file) for file in files]
        read = documents.read_text
        if data.source == "jsonl":
            read = functools.partial(documents.read_jsonl, field=data.field)
    sizes = np.array(lengths, np.int64)
    piece_length = max(MIN_PIECE, 16 * data.sequence_length)
    read = functools.partial(read, tokenizer=tokenizer)
    return Corpus(files, sizes, piece_length, read)


def _num_pieces(sizes: np.ndarray, piece_length: int) -> np.ndarray:
    return -(-sizes // piece_length)


def _is_integer(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "iu"
    except TypeError:
        return False
