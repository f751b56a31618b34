"""Batches for training and evaluation, the same on any number of hosts.

Every host runs the same stream of global batches and keeps its own rows, so the state
is one small record, equal on all hosts, that any number of hosts can go on from. The
price: each host tokenizes everything. Bytes and token files cost next to nothing; with
a slow tokenizer and large batches, tokenize beforehand.

Order: pieces of files are shuffled over the whole corpus anew in each epoch; packed
rows are then shuffled inside a window of about a million tokens, since the rows of one
piece follow one another. Going on from a state reads that one window again, and nothing
before it.
"""

import functools
import json
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxspeed.data.corpus import Corpus, Data, open_corpora
from jaxspeed.data.packing import Batch, Row, pack, stack
from jaxspeed.data.tokenizer import Tokenizer

WINDOW = 2**20
"""Tokens in the window of shuffled rows; 16 bytes each in memory."""


class Batches(Iterator[Batch]):
    """Global batches, or one host's rows of them, read ahead by a background thread.

    Its state is that of the batch handed out last, whatever was read ahead.
    """

    def __init__(self, batches: grain.IterDataset[Batch], identity: dict[str, Any]):
        self._running = [iter(batches)]
        self._identity = identity
        # Runs at the exit of the program too, while threads can still be stopped.
        self._close = weakref.finalize(self, _stop, self._running)

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._running:
            raise ValueError("these batches are closed; make new ones to go on")
        return self._running[0]

    def get_state(self) -> dict[str, Any]:
        """The position, as plain JSON, to be saved with a checkpoint.

        It is the same on every host, and also holds what identifies the data.
        """
        position = json.loads(json.dumps(self._iterator.get_state()))
        return {"data": self._identity, "position": position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that `state` was taken at.

        The number of hosts, the rows kept and the batch size may have changed.

        Raises:
            ValueError: the state belongs to other data or another order of them.
        """
        saved = state["data"]
        changed = {
            name: f"{saved.get(name)} -> {value}"
            for name, value in self._identity.items()
            if saved.get(name) != value
        }
        if changed:
            raise ValueError(
                "cannot continue in data that are not those of the saved state; "
                f"changed (saved -> now): {changed}. Restore these options and files, "
                "or start without the data state"
            )
        self._iterator.set_state(_with_tuples(state["position"]))

    def close(self) -> None:
        """Stops the background thread."""
        self._close()


def train_batches(
    data: Data, batch_size: int, *, rows: slice | None = None, read_ahead: int = 2
) -> Batches:
    """Batches without end, in a new order in every epoch if `data.shuffle`.

    Args:
        data: what to read.
        batch_size: B, rows in a global batch, over all hosts.
        rows: the rows of each global batch that this host keeps; all by default.
        read_ahead: batches that wait in memory; 0 reads when asked, with no thread.

    Raises:
        FileNotFoundError: a path matches no file.
        ValueError: a file is empty or malformed, or `rows` keeps none. Contents are
            checked as they are read, so an iteration can raise this too.
    """
    keep = _checked_rows(rows, batch_size)
    tokenizer = data.load_tokenizer()
    corpus, _ = open_corpora(data, tokenizer)
    piece_seed, row_seed = np.random.SeedSequence(data.seed).generate_state(2).tolist()
    pieces = grain.MapDataset.source(corpus)
    if data.shuffle:
        pieces = pieces.shuffle(seed=piece_seed)
    packed = pack(pieces.repeat(), data.sequence_length)
    if data.shuffle:
        # At most a quarter of the corpus, so that epochs hardly mix.
        window = min(WINDOW, corpus.length // 4) // data.sequence_length
        packed = grain.experimental.WindowShuffleIterDataset(
            packed, window_size=max(window, 1), seed=row_seed
        )
    batches = _batch(packed, batch_size, keep, read_ahead)
    return Batches(batches, _identity(data, corpus, tokenizer))


def held_out_batches(
    data: Data, batch_size: int, *, rows: slice | None = None, read_ahead: int = 2
) -> Batches:
    """One pass over the held-out documents, in the order of their files.

    The last batch is filled up with empty rows of weight 0, so all shapes are equal.

    Raises:
        FileNotFoundError: a path matches no file.
        ValueError: nothing is held out, or as in `train_batches`.
    """
    keep = _checked_rows(rows, batch_size)
    tokenizer = data.load_tokenizer()
    _, corpus = open_corpora(data, tokenizer)
    if not len(corpus):
        raise ValueError(
            f"nothing is held out: held_out_fraction={data.held_out_fraction} of a "
            "corpus with too few pieces; give held_out_paths, or a larger fraction of "
            "more files"
        )
    packed = pack(grain.MapDataset.source(corpus), data.sequence_length)
    batches = _batch(packed, batch_size, keep, read_ahead)
    return Batches(batches, _identity(data, corpus, tokenizer))


def host_rows(batch_size: int, host: int, num_hosts: int) -> slice:
    """The rows of a global batch that belong to `host`, in equal shares.

    Raises:
        ValueError: the hosts do not divide the batch.
    """
    if batch_size % num_hosts or not 0 <= host < num_hosts:
        raise ValueError(
            f"host {host} of {num_hosts} has no equal share of batch_size="
            f"{batch_size}; make it a multiple of the hosts, counted from 0"
        )
    share = batch_size // num_hosts
    return slice(host * share, (host + 1) * share)


def _batch(
    packed: grain.IterDataset[Row], batch_size: int, keep: slice, read_ahead: int
) -> grain.IterDataset[Batch]:
    batches = packed.batch(
        batch_size, batch_fn=functools.partial(stack, batch_size=batch_size, keep=keep)
    )
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=read_ahead
    )


def _checked_rows(rows: slice | None, batch_size: int) -> slice:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    keep = slice(None) if rows is None else rows
    if not range(batch_size)[keep]:
        raise ValueError(f"{keep} keeps none of the {batch_size} rows of a batch")
    return keep


def _identity(data: Data, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must not change between saving a state and going on from it."""
    return {
        "source": data.source,
        "files": corpus.digest,
        "window": WINDOW,
        "tokenizer": tokenizer.digest,
        "token_dtype": data.token_dtype,
        "field": data.field,
        "sequence_length": data.sequence_length,
        "shuffle": data.shuffle,
        "seed": data.seed,
    }


def _stop(running: list[grain.DatasetIterator]) -> None:
    # Popped, since what is left until the interpreter ends is closed once more then,
    # by grain, and fails.
    running.pop().close()


def _with_tuples(state: Any) -> Any:
    # grain compares parts of its state with tuples, which JSON turns into lists.
    if isinstance(state, dict):
        return {name: _with_tuples(value) for name, value in state.items()}
    return tuple(map(_with_tuples, state)) if isinstance(state, list) else state
