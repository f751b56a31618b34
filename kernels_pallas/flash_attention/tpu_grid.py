"""Grids of the TPU kernels: what each step works on, and the blocks that it needs."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.flash_attention.schedule import Index, Schedule


@dataclasses.dataclass(frozen=True)
class Step:
    """The blocks of one grid step.

    Attributes:
        batch, head, group: which sequence, query head and key head.
        query, key: block indices.
        first, last: whether the step begins or ends an accumulation.
        runs: whether there is anything to compute.
    """

    batch: Index
    head: Index
    group: Index
    query: Index
    key: Index
    first: Index
    last: Index
    runs: Index


@dataclasses.dataclass(frozen=True)
class Grid:
    """Grid of one kernel over batch, heads and the pairs of blocks of `schedule`.

    Accumulating for a query block, a row of the grid belongs to one query head.
    Accumulating for a key block, it belongs to one key head, and the query heads that
    share it are the innermost dim: their gradients add up where they are computed.

    Attributes:
        schedule: the pairs of blocks.
        batch, heads, groups: sizes.
        dynamic_window: whether the window is known only when the kernel runs.
    """

    schedule: Schedule
    batch: int
    heads: int
    groups: int
    dynamic_window: bool

    @property
    def repeats(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the grid's dims."""
        rows, width = self.schedule.rows, self.schedule.width
        if self.schedule.by_query:
            return self.batch, self.heads, rows, width
        return self.batch, self.groups, rows, width, self.repeats

    @property
    def semantics(self) -> tuple[pltpu.GridDimensionSemantics, ...]:
        """Which dims may run in any order, and on either core of a chip."""
        in_order = (pltpu.ARBITRARY,) * (len(self.shape) - 3)
        return pltpu.PARALLEL, pltpu.PARALLEL, pltpu.PARALLEL, *in_order

    def here(self, window: Any) -> Step:
        """The step that the kernel is in; `window` is its scalar argument, or None."""
        ids = [pl.program_id(dim) for dim in range(len(self.shape))]
        return self.step(*ids, window=window)

    def step(self, *ids: Index, window: Any) -> Step:
        """The step at grid indices `ids`."""
        limit = window[0] if self.dynamic_window else None
        place = self.schedule.locate(ids[2], ids[3], limit)
        if self.schedule.by_query:
            batch, head = ids[:2]
            group = lax.div(head, self.repeats) if self.repeats > 1 else head
            pair = (place.outer, place.inner)
            return Step(batch, head, group, *pair, place.first, place.last, place.runs)
        batch, group, _, _, repeat = ids
        head = group * self.repeats + repeat
        first = place.first & (repeat == 0)
        last = place.last & (repeat == self.repeats - 1)
        pair = (place.inner, place.outer)
        return Step(batch, head, group, *pair, first, last, place.runs)

    def spec(
        self, shape: tuple[int | None, ...], index: Callable[[Step], tuple[Index, ...]]
    ) -> pl.BlockSpec:
        """Blocks of `shape` at the block indices that `index` gives for a step."""

        def index_map(*arguments: Any) -> tuple[Index, ...]:
            count = len(self.shape)
            ids, (scalars,) = arguments[:count], arguments[count:]
            return index(self.step(*ids, window=scalars.window))

        return pl.BlockSpec(shape, index_map)
