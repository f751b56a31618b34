"""Tokenizers: text to ids and back.

Bytes by default, so nothing has to be downloaded or trained; any `tokenizer.json` of
the Hugging Face `tokenizers` package; or bare ids, for token files whose tokenizer is
not at hand. `TextStream` turns ids into text while they are being generated.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

Ids = Int32[np.ndarray, " S"]

_END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
)


class Tokenizer(Protocol):
    """What the data pipeline and text generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it; the size of the model's embedding."""
        ...

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document, or None if there is none."""
        ...

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give equal ids."""
        ...

    def encode(self, text: str | bytes) -> Ids:
        """The ids of `text`, with nothing added before or after."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD, special ids vanish."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 text, 256 ends a document."""

    vocab_size: int = 257
    end_of_document: int | None = 256
    digest: str = "bytes"

    def encode(self, text: str | bytes) -> Ids:
        """The bytes of `text`, int32 [S]."""
        content = text.encode() if isinstance(text, str) else text
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD, id 256 vanishes.

        Raises:
            ValueError: an id outside 0 to 256.
        """
        array = _checked(ids, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class BareIds:
    """For token files whose tokenizer is not at hand: text is the ids, "17 4 250"."""

    vocab_size: int
    end_of_document: int | None = None

    def __post_init__(self) -> None:
        _check_end_of_document(self.end_of_document, self.vocab_size)

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give equal ids."""
        return f"{self.vocab_size} ids, end {self.end_of_document}"

    def encode(self, text: str | bytes) -> Ids:
        """The ids written in `text`, int32 [S].

        Raises:
            ValueError: a word that is not an id of the vocabulary.
        """
        return _checked(map(int, text.split()), self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        """The ids with a space before each, so that pieces can be joined."""
        return "".join(f" {token}" for token in _checked(ids, self.vocab_size))


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` package.

    Whatever truncation and padding the file asks for is switched off, and its
    beginning- and end-of-sequence ids are not added: documents are packed here, and
    end with `end_of_document` alone. That id is the `eos_token` of a
    `tokenizer_config.json` in the same folder, or else the first of the usual names
    (`<|endoftext|>`, `</s>`, ...) that the vocabulary has, or else None.

    Args:
        path: the file, or the folder that holds it.
        end_of_document: overrides that id.

    Raises:
        ImportError: the `tokenizers` package is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer, or has no such id.
    """

    def __init__(self, path: str | os.PathLike, end_of_document: int | None = None):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ImportError(
                f"reading the tokenizer {os.fspath(path)!r} needs the package "
                "'tokenizers': pip install 'jaxspeed[hf]', or use tokenizer=None for "
                "bytes"
            ) from error
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise FileNotFoundError(
                f"no tokenizer at {os.fspath(file)!r}; give a tokenizer.json file or "
                "the folder that holds it, or None for bytes"
            )
        try:
            self._backend = Backend.from_file(os.fspath(file))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{os.fspath(file)!r} is not a tokenizer of the Hugging Face "
                f"'tokenizers' package: {error}"
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        # Not the number of entries: a vocabulary may have holes.
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        if end_of_document is None:
            end_of_document = self._find_end_of_document(os.path.dirname(file))
        _check_end_of_document(end_of_document, self.vocab_size)
        self.end_of_document = end_of_document
        with open(file, "rb") as content:
            content_digest = hashlib.file_digest(content, "sha256").hexdigest()
        self.digest = f"{content_digest}, end {end_of_document}"

    def encode(self, text: str | bytes) -> Ids:
        """The ids of `text`, int32 [S]; bytes must be UTF-8."""
        text = text if isinstance(text, str) else text.decode()
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids vanish.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self._backend.decode(_checked(ids, self.vocab_size).tolist())

    def _find_end_of_document(self, folder: str) -> int | None:
        names = _END_OF_DOCUMENT_NAMES
        config = os.path.join(folder, "tokenizer_config.json")
        if os.path.isfile(config):
            with open(config, encoding="utf-8") as file:
                try:
                    token = json.load(file).get("eos_token")
                except (ValueError, AttributeError) as error:
                    raise ValueError(f"{config!r} is not valid: {error}") from error
            name = token.get("content") if isinstance(token, dict) else token
            names = (name, *names) if isinstance(name, str) else names
        found = (self._backend.token_to_id(name) for name in names)
        return next((token for token in found if token is not None), None)


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """Bytes if `path` is None, else the Hugging Face tokenizer at that path."""
    return ByteTokenizer() if path is None else HuggingFaceTokenizer(path)


class TextStream:
    """Text of ids that arrive a few at a time, as in generation.

    A character whose bytes have not all arrived is held back, so that what is given
    out, joined, equals the decoding of all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        # Ids given out last, kept because some tokenizers write a token differently
        # at the start of a text; then the ids that are not given out yet.
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; empty if they end inside a character."""
        self._held.extend(int(token) for token in ids)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is still held back; an unfinished character becomes U+FFFD."""
        text = self._new_text()
        self._context, self._held = [], []
        return text

    def _new_text(self) -> str:
        known = self._decode(self._context)
        return self._decode(self._context + self._held)[len(known) :]


def _checked(ids: Iterable[int], vocab_size: int) -> Ids:
    array = np.asarray(ids if isinstance(ids, np.ndarray | Sequence) else list(ids))
    if array.size and not (0 <= array.min() and array.max() < vocab_size):
        raise ValueError(
            f"ids from {array.min()} to {array.max()} do not fit a vocabulary of "
            f"{vocab_size}: ids go from 0 to {vocab_size - 1}"
        )
    return array.astype(np.int32)


def _check_end_of_document(token: int | None, vocab_size: int) -> None:
    if token is not None and not 0 <= token < vocab_size:
        raise ValueError(
            f"end_of_document={token} is not in the vocabulary of {vocab_size}; give "
            f"an id from 0 to {vocab_size - 1}"
        )
