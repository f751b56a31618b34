"""Documents packed into rows of equal length, without padding and without mixing.

A document of n ids gives n - 1 pairs (token, next token). The pairs, not the tokens,
are laid end to end and cut into rows (grain's concat-then-split), so that no target
crosses into another document, and none is lost where a row ends: its target is the
first token of the next row. Attention must not look across `segments`; `positions`
start at 0 with every document, and with the rest of one that a row continues.
"""

from collections.abc import Sequence
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Float32, Int32

from jaxspeed.data.tokenizer import Ids

Row = dict[str, np.ndarray]

# Read ahead of the row being packed, so that two documents are tokenized at once.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(TypedDict):
    """Rows of a batch. Padding has 0 everywhere.

    Attributes:
        tokens: ids that the model sees.
        targets: the id that follows each, in the same document.
        segments: which document of its row a token belongs to, from 1; 0 is padding.
        positions: place of a token in its document, from 0.
        weights: 1 where there is a target, 0 for padding.
    """

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]
    segments: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    weights: Float32[np.ndarray, "B S"]


class _Pairs(grain.experimental.FlatMapTransform):
    """A piece of a corpus into the pairs of each document, int32 [n - 1, 2]."""

    def flat_map(self, element: list[Ids]) -> Sequence[Row]:
        return [
            {"pairs": np.lib.stride_tricks.sliding_window_view(document, 2)}
            for document in element
            if len(document) > 1
        ]


def pack(
    pieces: grain.MapDataset[list[Ids]], sequence_length: int
) -> grain.IterDataset[Row]:
    """Rows of `sequence_length` pairs; only the last row of all can have padding."""
    documents = grain.experimental.FlatMapIterDataset(
        pieces.to_iter_dataset(_READ), _Pairs()
    )
    return grain.experimental.ConcatThenSplitIterDataset(
        documents, length_struct={"pairs": sequence_length}
    )


def stack(rows: Sequence[Row], batch_size: int, keep: slice) -> Batch:
    """Rows `keep` of a batch, after empty rows have filled it up to `batch_size`."""
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    kept = [*rows, *[empty] * (batch_size - len(rows))][keep]
    pairs = np.stack([row["pairs"] for row in kept])
    segments = np.stack([row["pairs_segment_ids"] for row in kept])
    return Batch(
        tokens=np.ascontiguousarray(pairs[..., 0]),
        targets=np.ascontiguousarray(pairs[..., 1]),
        segments=segments,
        positions=np.stack([row["pairs_positions"] for row in kept]),
        weights=(segments > 0).astype(np.float32),
    )
