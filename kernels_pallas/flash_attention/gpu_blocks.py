"""Which blocks a tile meets on GPU, and which of those need no mask."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

Index = Any
"""An int32 scalar, perhaps traced."""


@dataclasses.dataclass(frozen=True)
class Spans:
    """Blocks `first <= i < end`; those with `low <= i < high` are seen whole."""

    first: Index
    low: Index
    high: Index
    end: Index


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the queries of a sequence see of its keys.

    Attributes:
        length: tokens that are not padding.
        padded: tokens with the padding; a multiple of every size of a block.
        causal: whether no key after a query is seen.
        window: int32 scalar, or None.
        segments: whether any block may need a mask, as documents end anywhere.
    """

    length: int
    padded: int
    causal: bool
    window: Index | None
    segments: bool

    def keys_of(self, row: Index, rows: int, size: int) -> Spans:
        """The blocks of `size` keys that queries `row <= i < row + rows` see."""
        last = row + (rows - 1)
        first, low = jnp.int32(0), jnp.int32(0)
        if self.window is not None:
            first = _divide(jnp.maximum(row - self.window + 1, 0), size)
            low = _divide(jnp.maximum(last - self.window, -1) + size, size)
        if self.causal:
            end, high = last + 1, row + 1
        else:
            end, high = jnp.int32(self.length), jnp.int32(self.length)
            if self.window is not None:
                end = jnp.minimum(end, last + self.window)
                high = jnp.minimum(high, row + self.window)
        return self._spans(first, low, high, end, size)

    def queries_of(self, row: Index, rows: int, size: int) -> Spans:
        """The blocks of `size` queries that see keys `row <= j < row + rows`."""
        last = row + (rows - 1)
        first, low = jnp.int32(0), jnp.int32(0)
        if self.causal:
            first = _divide(row, size)
            low = _divide(last + (size - 1), size)
        end, high = jnp.int32(self.padded), jnp.int32(self.padded)
        if self.window is not None:
            end = jnp.minimum(end, last + self.window)
            high = jnp.minimum(high, row + self.window)
            if not self.causal:
                first = _divide(jnp.maximum(row - self.window + 1, 0), size)
                low = _divide(jnp.maximum(last - self.window, -1) + size, size)
        return self._spans(first, low, high, end, size)

    def _spans(
        self, first: Index, low: Index, high: Index, end: Index, size: int
    ) -> Spans:
        """From tokens at the ends to blocks, in order."""
        end = _divide(jnp.minimum(end, self.padded) + (size - 1), size)
        first = jnp.minimum(first, end)
        low = end if self.segments else jnp.clip(low, first, end)
        high = jnp.clip(_divide(high, size), low, end)
        return Spans(first, low, high, end)


def _divide(x: Index, size: int) -> Index:
    """`x // size` for x >= 0."""
    return lax.div(x, jnp.int32(size))
