"""Which pairs of a query block and a key block a kernel visits, and in which order.

A causal mask leaves the lower triangle of the grid of block pairs. Row i of it has
about i pairs, so a rectangular grid would idle for half of its steps. Instead two rows
share one: row r and row n-1-r together always have the same number of pairs, and the
folded grid of n/2 rows visits the triangle and nothing else. A static window leaves a
band, whose rows are of one length already, and so are those of attention that is not
causal.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

Index = Any
"""A block index: an int, or an int32 scalar that is being traced."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a sequence is cut, and what a query may see of it.

    Attributes:
        length: tokens, a multiple of both block sizes.
        query, key: tokens in a block; one divides the other.
        window: a query sees itself and the `window - 1` tokens before it; None: all.
        causal: if False, it sees as far after itself as before.
    """

    length: int
    query: int
    key: int
    window: int | None = None
    causal: bool = True

    def keys_of(self, query: Index, window: Index | None) -> tuple[Index, Index]:
        """First and last key block with anything that query block `query` may see."""
        first, latest = query * 0, (query + 1) * self.query - 1
        if window is not None:
            earliest = _maximum(query * self.query - window + 1, 0)
            first = _divide(earliest, self.key)
        if not self.causal:
            latest = self._reach(latest, window)
        return first, _divide(latest, self.key)

    def queries_of(self, key: Index, window: Index | None) -> tuple[Index, Index]:
        """First and last query block that may see anything of key block `key`."""
        earliest = key * self.key
        if not self.causal:
            near = earliest - (self.length if window is None else window - 1)
            earliest = _maximum(near, 0)
        latest = self._reach((key + 1) * self.key - 1, window)
        return _divide(earliest, self.query), _divide(latest, self.query)

    def _reach(self, token: Index, window: Index | None) -> Index:
        """The last token that is within the window of `token`."""
        ahead = self.length if window is None else window - 1
        return _minimum(token + ahead, self.length - 1)

    @property
    def count(self) -> int:
        """How many pairs are visited."""
        rows = range(self.length // self.query)
        return sum(len(_inclusive(*self.keys_of(i, self.window))) for i in rows)

    def pairs(self) -> np.ndarray:
        """Every pair (query block, key block) that is visited, int32 [pairs, 2]."""
        rows = (
            (query, key)
            for query in range(self.length // self.query)
            for key in _inclusive(*self.keys_of(query, self.window))
        )
        return np.asarray(list(rows), np.int32)


@dataclasses.dataclass(frozen=True)
class Place:
    """What one grid step does.

    Attributes:
        outer: the block whose result is accumulated.
        inner: the block it is combined with. A step that does not run names the block
            of a neighbouring step, so that nothing is fetched for it.
        first, last: whether this step begins or ends the accumulation.
        runs: whether there is anything to compute.
    """

    outer: Index
    inner: Index
    first: Index
    last: Index
    runs: Index


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The grid of a kernel: `rows` independent rows of `width` steps each.

    Attributes:
        blocks: the pairs to visit.
        by_query: True accumulates over keys for each query block, False over queries
            for each key block.
    """

    blocks: Blocks
    by_query: bool

    @property
    def _outer(self) -> int:
        block = self.blocks.query if self.by_query else self.blocks.key
        return self.blocks.length // block

    @property
    def _folds(self) -> bool:
        return self.blocks.causal and self.blocks.window is None

    @property
    def rows(self) -> int:
        """Rows of the grid."""
        return (self._outer + 1) // 2 if self._folds else self._outer

    @property
    def width(self) -> int:
        """Steps in a row."""
        lengths = [self._length(outer) for outer in range(self._outer)]
        if not self._folds:
            return max(lengths)
        folded = [a + b for a, b in zip(lengths, lengths[::-1], strict=True)]
        return folded[0] if self._outer > 1 else lengths[0]

    def locate(self, row: Index, step: Index, window: Index | None) -> Place:
        """What the step `step` of row `row` does.

        Args:
            row, step: int32 scalars, the grid indices.
            window: int32 scalar known only when the kernel runs, or None.
        """
        outer, inner, idle = self._unfold(row, step)
        begin, end = self._span(outer, self.blocks.window)
        idle = idle | (inner > end)
        first, last = ~idle & (inner == begin), ~idle & (inner == end)
        inner = jnp.where(idle, end, inner)
        if window is not None:
            low, high = self._span(outer, window)
            idle = idle | (inner < low) | (inner > high)
            inner = jnp.clip(inner, low, high)
        return Place(outer, inner, first, last, ~idle)

    def _unfold(self, row: Index, step: Index) -> tuple[Index, Index, Index]:
        """The outer block, the inner block, and whether the row was used up before."""
        if not self._folds:
            begin, _ = self._span(row, self.blocks.window)
            return row, begin + step, jnp.bool_(False)
        begin, end = self._span(row, None)
        mirrored = self._outer - 1 - row
        used = end - begin + 1
        folded = step >= used
        outer = jnp.where(folded, mirrored, row)
        begin, _ = self._span(outer, None)
        inner = begin + jnp.where(folded, step - used, step)
        return outer, inner, folded & (mirrored == row)

    def _span(self, outer: Index, window: Index | None) -> tuple[Index, Index]:
        find = self.blocks.keys_of if self.by_query else self.blocks.queries_of
        return find(outer, window)

    def _length(self, outer: int) -> int:
        return len(_inclusive(*self._span(outer, self.blocks.window)))


def _inclusive(first: int, last: int) -> range:
    return range(first, last + 1)


def _divide(x: Index, y: int) -> Index:
    """`x // y` for x >= 0, in one scalar instruction."""
    if y == 1 or isinstance(x, int):
        return x // y
    return lax.div(x, np.int32(y))


def _maximum(x: Index, y: int) -> Index:
    return max(x, y) if isinstance(x, int) else jnp.maximum(x, y)


def _minimum(x: Index, y: int) -> Index:
    return min(x, y) if isinstance(x, int) else jnp.minimum(x, y)
