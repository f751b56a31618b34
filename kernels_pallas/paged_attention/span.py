"""Which keys the queries of a block see, for numbers and for traced scalars alike."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernels_pallas.paged_attention.plan import Blocks

Index = Any


@dataclasses.dataclass(frozen=True)
class Span:
    """A sequence, cut into blocks.

    Attributes:
        blocks: their sizes.
        window: how far back a query sees, or None.
        start, end: its first query, and the one after its last.
        length: its keys; the last query belongs to the last key.
    """

    blocks: Blocks
    window: int | None
    start: Index
    end: Index
    length: Index

    def position(self, row: Index) -> Index:
        """Of a query in its sequence."""
        return row + (self.length - self.end)

    def sees(self, position: Index, key: Index) -> Index:
        """Whether a query at a position sees a key."""
        seen = key <= position
        if self.window is None:
            return seen
        return seen & (key > position - self.window)

    def chunks(self, tile: Index) -> tuple[Index, Index]:
        """First block of keys that block `tile` of queries sees, and the end of them.

        At least one, also of a sequence that is shorter than its queries are many.
        """
        first_row = jnp.maximum(self.start, tile * self.blocks.queries)
        last_row = jnp.minimum(self.end, (tile + 1) * self.blocks.queries) - 1
        size = jnp.int32(self.blocks.keys)
        last = lax.div(jnp.maximum(self.position(last_row), 0), size)
        if self.window is None:
            return last * 0, last + 1
        earliest = self.position(first_row) - self.window + 1
        first = lax.div(jnp.maximum(earliest, 0), size)
        return jnp.minimum(first, last), last + 1
