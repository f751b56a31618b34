"""Rows of a layout in groups of about one length, for plain JAX."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Int

from kernels_pallas.block_sparse_attention.pattern import Mask

CELL = 128
"""Queries that are worked on together, at most, and keys that are fetched together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of cells that list about as many cells of keys, in every layout.

    Attributes:
        rows: which they are.
        lists: the cells of keys that each lists in each layout; -1 after the end.
    """

    rows: Int[np.ndarray, " rows"]
    lists: Int[np.ndarray, "D rows L"]


def cell_size(block: int) -> int:
    """Tokens in a cell: a large block is cut where that leaves pieces of some size."""
    size = math.gcd(block, CELL)
    return size if size >= 16 else block


@functools.lru_cache(maxsize=64)
def rows_by_length(mask: Mask) -> tuple[Rows, ...]:
    """Every row that lists anything, with at most a fourth of its list empty.

    Rows that list nothing in any layout are in none.
    """
    layouts = range(len(mask.pattern.distinct))
    cells = np.stack([mask.cells(i, cell_size(mask.block)) for i in layouts])
    lengths = cells.sum(axis=2).max(axis=0)
    padded = np.array([_rounded(length) for length in range(cells.shape[1] + 1)])
    padded = np.minimum(padded, cells.shape[1])[lengths]
    found = []
    for length in np.unique(padded[lengths > 0]):
        rows = np.nonzero((padded == length) & (lengths > 0))[0]
        mine = cells[:, rows]
        # A stable sort puts the listed cells first, in order.
        order = np.argsort(~mine, axis=2, kind="stable")[:, :, :length]
        listed = np.take_along_axis(mine, order, axis=2)
        lists = np.where(listed, order, -1)
        found.append(Rows(rows.astype(np.int32), lists.astype(np.int32)))
    return tuple(found)


def _rounded(length: int) -> int:
    """The next of 1 to 4, 5 to 8, 10, 12, 14, 16, 20, 24, ..."""
    step = 2 ** max(math.ceil(math.log2(max(length, 1))) - 3, 0)
    return math.ceil(length / step) * step
