"""The rule of the TPU kernels: which scores of a listed pair of blocks count."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.block_sparse_attention.lists import EDGE, PARTIAL
from kernels_pallas.block_sparse_attention.tpu_grid import Grid, Scalars, Step
from kernels_pallas.flash_attention.reference import MASKED
from kernels_pallas.flash_attention.tpu_kernels import LANES, LOG2_E, Pair, spread


@dataclasses.dataclass(frozen=True)
class Masking:
    """Scores of a pair of blocks.

    The first mark of a key is its position, and of a query the last position that it
    sees; the second, if given, is the segment of either.

    Attributes:
        grid: the kernel's grid.
        scale: factor of the scores, natural units.
        cell: tokens that share a bit of the words.
        kinds: those that occur.
        sees_nothing: whether a query may have no key.
    """

    grid: Grid
    scale: float
    cell: int
    kinds: tuple[int, ...]
    sees_nothing: bool

    def here(self, scalars: Scalars) -> Step:
        """The step that the kernel is in."""
        return self.grid.here(scalars)

    def start(self, step: Step, scalars: Scalars) -> tuple[float, float]:
        """Nothing is seen before the first key."""
        return MASKED, 0.0

    def when_needed(
        self, step: Step, scalars: Scalars, compute: Callable[[int], None]
    ) -> None:
        """Runs `compute(kind)` in the variant that the pair needs."""
        for kind in self.kinds:
            pl.when(step.runs & (step.kind == kind))(functools.partial(compute, kind))

    def scores(self, product: Array, pair: Pair) -> tuple[Array, None]:
        """Scores in units of log 2."""
        scores = product * (self.scale * LOG2_E)
        seen = []
        if pair.kind & PARTIAL:
            seen.append(self._listed(pair, product.shape))
        if pair.kind & EDGE:
            rows = spread(pair.rows[0], product.shape[1])
            columns = pair.columns[0]
            seen.append(rows >= columns if self.grid.by_query else columns >= rows)
        if len(pair.rows) > 1:
            seen.append(spread(pair.rows[1], product.shape[1]) == pair.columns[1])
        if not seen:
            return scores, None
        return jnp.where(functools.reduce(jnp.logical_and, seen), scores, MASKED), None

    def _listed(self, pair: Pair, shape: tuple[int, ...]) -> Array:
        """Whether the cells of row and column are together in the layout."""
        rows, columns = shape
        height = min(self.cell, rows)
        cells = [(pair.offset + row) // self.cell for row in range(0, rows, height)]
        words = jnp.concatenate(
            [jnp.full((height, LANES), pair.table[0, cell]) for cell in cells], axis=0
        )
        place = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        bits = jnp.int32(1) << lax.div(place, np.int32(self.cell))
        return (spread(words, columns) & bits) != 0
