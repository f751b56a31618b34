"""Rows of a layout in groups of about one length, for plain JAX."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Int

from kernels_pallas.block_sparse_attention.pattern import Mask

CELL = 128
"""Queries that are worked on together, at most, and keys that are fetched together."""

EMPTY = 0.25
"""How much of the lists may be added to them, so that there are few programs."""


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
    """Every row that lists anything, with few groups and little of their lists empty.

    Rows that list nothing in any layout are in none.
    """
    layouts = range(len(mask.pattern.distinct))
    cells = np.stack([mask.cells(i, cell_size(mask.block)) for i in layouts])
    lengths = cells.sum(axis=2).max(axis=0)
    found, shortest = [], 1
    for longest in _longest(lengths[lengths > 0]):
        rows = np.nonzero((shortest <= lengths) & (lengths <= longest))[0]
        shortest = longest + 1
        mine = cells[:, rows]
        # A stable sort puts the listed cells first, in order.
        order = np.argsort(~mine, axis=2, kind="stable")[:, :, :longest]
        listed = np.take_along_axis(mine, order, axis=2)
        lists = np.where(listed, order, -1)
        found.append(Rows(rows.astype(np.int32), lists.astype(np.int32)))
    return tuple(found)


def _longest(lengths: Int[np.ndarray, " rows"]) -> list[int]:
    """The longest list of each group.

    Neighbouring groups are joined, those first to which it adds least, as long as all
    that is added stays below `EMPTY`.
    """
    values, rows = map(list, np.unique(lengths, return_counts=True))
    spare = EMPTY * lengths.sum()
    while len(values) > 1:
        added = np.diff(values) * rows[:-1]
        least = int(np.argmin(added))
        spare -= added[least]
        if spare < 0:
            break
        rows[least + 1] += rows[least]
        del values[least], rows[least]
    return [int(value) for value in values]
