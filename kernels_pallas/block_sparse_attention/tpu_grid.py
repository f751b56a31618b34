"""Grids of the TPU kernels: what each step works on, and the blocks that it needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.block_sparse_attention.lists import (
    FIRST,
    KIND_BITS,
    KIND_SHIFT,
    LAST,
    PLACE_BITS,
    PLACE_SHIFT,
    REPEAT_BITS,
    REPEAT_SHIFT,
    RUNS,
    WORDS_SHIFT,
)

Index = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scalars:
    """The scalar arguments of a kernel: `lists.Lists`, flat, int32.

    Attributes:
        first_line: [1], which head, or group of heads, of the layout is the first.
        of_line: which list each of them has.
        places, marks: [L * E].
    """

    first_line: Any
    of_line: Any
    places: Any
    marks: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """The blocks of one grid step.

    Attributes:
        batch, head, group: which sequence, query head and key head.
        query, key: block indices.
        first, last: whether the step begins or ends an accumulation.
        runs: whether there is anything to compute.
        kind: which masks it needs.
        words: index of its words.
    """

    batch: Index
    head: Index
    group: Index
    query: Index
    key: Index
    first: Index
    last: Index
    runs: Index
    kind: Index
    words: Index


@dataclasses.dataclass(frozen=True)
class Grid:
    """Grid of a kernel: batch, query heads or key heads, entries of their list.

    The query heads that share a key head and a list are the innermost dim: their
    gradients add up where they are computed.

    Attributes:
        by_query: True accumulates over keys for a query head, False over queries for
            a key head.
        batch, heads, groups: sizes.
        lines: lines of the layout: heads or groups; 1 if all are the same.
        width: entries of a list.
        inner: query heads that an entry is for.
    """

    by_query: bool
    batch: int
    heads: int
    groups: int
    lines: int
    width: int
    inner: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of the grid's dims."""
        lines = self.heads if self.by_query else self.groups
        return self.batch, lines, self.width, self.inner

    @property
    def semantics(self) -> tuple[pltpu.GridDimensionSemantics, ...]:
        """Which dims may run in any order, and on either core of a chip."""
        return pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY

    def here(self, scalars: Scalars) -> Step:
        """The step that the kernel is in."""
        return self.step([pl.program_id(dim) for dim in range(4)], scalars)

    def step(self, ids: Sequence[Index], scalars: Scalars) -> Step:
        """The step at the given grid indices."""
        batch, line, entry, inner = ids
        mine = scalars.first_line[0] + line if self.lines > 1 else 0
        at = scalars.of_line[mine] * self.width + entry
        place, mark = scalars.places[at], scalars.marks[at]
        repeats = self.heads // self.groups
        if self.by_query:
            head = line
            group = lax.div(line, np.int32(repeats)) if repeats > 1 else line
        else:
            group = line
            head = line * repeats + inner + (mark >> REPEAT_SHIFT & REPEAT_BITS)
        return Step(
            batch,
            head,
            group,
            query=place >> PLACE_SHIFT,
            key=place & PLACE_BITS,
            first=((mark & FIRST) != 0) & (inner == 0),
            last=((mark & LAST) != 0) & (inner == self.inner - 1),
            runs=(mark & RUNS) != 0,
            kind=mark >> KIND_SHIFT & KIND_BITS,
            words=mark >> WORDS_SHIFT,
        )


def block_specs(
    grid: Grid, query: int, key: int, head_dim: int, words: int
) -> dict[str, pl.BlockSpec]:
    """The blocks that a step reads or writes, for each layout of an array.

    Args:
        grid: the kernel's grid.
        query, key: tokens in a block of queries and of keys.
        head_dim: K.
        words: how many there are for a pair of blocks.
    """

    def spec(shape: tuple, index: Callable[[Step], tuple], **where: Any) -> Any:
        def index_map(*arguments: Any) -> tuple:
            return index(grid.step(arguments[:4], arguments[4]))

        return pl.BlockSpec(shape, index_map, **where)

    wide = (None, None, query, head_dim), (None, None, key, head_dim)
    row, column = (None, 1, query), (None, 1, key)
    scalar = {"memory_space": pltpu.SMEM}
    return {
        "query": spec(wide[0], lambda s: (s.batch, s.head, s.query, 0)),
        "key": spec(wide[1], lambda s: (s.batch, s.group, s.key, 0)),
        "per_query": spec((None, *row), lambda s: (s.batch, s.head, 0, s.query)),
        "reach": spec(row, lambda s: (0, 0, s.query)),
        "position": spec(column, lambda s: (0, 0, s.key)),
        "query_segment": spec(row, lambda s: (s.batch, 0, s.query)),
        "key_segment": spec(column, lambda s: (s.batch, 0, s.key)),
        "words": spec((None, 1, words), lambda s: (s.words, 0, 0), **scalar),
    }
