"""Held-out loss, in bits per byte, beside what a unigram model would reach."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from jaxspeed.data import (
    BareIds,
    ByteTokenizer,
    Data,
    Tokenizer,
    held_out_batches,
)
from jaxspeed.train.engine import Engine
from jaxspeed.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Averages over held-out text.

    Attributes:
        loss: nats per token.
        bits_per_byte: of the text, so it compares across tokenizers; None where the
            tokenizer has no text.
        unigram_bits_per_byte: the best that a model of token frequencies can do, its
            frequencies taken from this very text; None likewise.
        tokens: how many tokens were predicted.
    """

    loss: float
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    tokens: int


def evaluate(
    engine: Engine,
    state: TrainState,
    data: Data,
    *,
    batch_size: int,
    num_batches: int,
    tokenizer: Tokenizer,
) -> HeldOut:
    """The loss on the first `num_batches` of held-out text.

    Raises:
        ValueError: nothing is held out.
    """
    losses: list[Any] = []
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    num_bytes = 0
    batches = held_out_batches(data, batch_size)
    for batch in itertools.islice(batches, num_batches):
        losses.append(engine.evaluate(state, batch))
        kept = batch["targets"][batch["weights"] > 0]
        counts += np.bincount(kept, minlength=tokenizer.vocab_size)
        num_bytes += _num_bytes(tokenizer, kept)
    batches.close()
    total = sum(float(loss.total) for loss in losses)
    tokens = int(counts.sum())
    frequency = counts[counts > 0] / tokens
    unigram = -float((frequency * np.log2(frequency)).sum()) * tokens
    return HeldOut(
        loss=total / tokens,
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
        unigram_bits_per_byte=unigram / num_bytes if num_bytes else None,
        tokens=tokens,
    )


def _num_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of text that the ids stand for; exact for bytes, 0 for bare ids."""
    if isinstance(tokenizer, BareIds):
        return 0
    if isinstance(tokenizer, ByteTokenizer):
        return int((ids < 256).sum())
    return len(tokenizer.decode(ids.tolist()).encode())
