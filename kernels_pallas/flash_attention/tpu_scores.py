"""The rule of flash attention's TPU kernels: which scores count, and what they are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.flash_attention.inputs import Options
from kernels_pallas.flash_attention.reference import MASKED
from kernels_pallas.flash_attention.schedule import Index
from kernels_pallas.flash_attention.tpu_grid import Grid, Step
from kernels_pallas.flash_attention.tpu_kernels import LOG2_E, Pair, spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scalars:
    """The scalar arguments of a kernel, each [N] or None.

    Attributes:
        window: int32 [1].
        slopes, sinks: float32 [H].
    """

    window: Any
    slopes: Any
    sinks: Any


@dataclasses.dataclass(frozen=True)
class Masking:
    """Scores of a pair of blocks; the first mark of a token is its segment, if given.

    Attributes:
        grid: the kernel's grid.
        options: those of the call.
        tokens: how many there are before padding.
        has_segments: whether tokens have marks.
    """

    grid: Grid
    options: Options
    tokens: int
    has_segments: bool

    sees_nothing = False  # every query sees itself

    @property
    def scale(self) -> float:
        """Factor of the scores, natural units."""
        return self.options.scale

    def here(self, scalars: Scalars) -> Step:
        """The step that the kernel is in."""
        return self.grid.here(scalars.window)

    def start(self, step: Step, scalars: Scalars) -> tuple[Array | float, float]:
        """The head's sink is a key that every row has seen before."""
        if scalars.sinks is None:
            return MASKED, 0.0
        return scalars.sinks[step.head] * LOG2_E, 1.0

    def when_needed(
        self, step: Step, scalars: Scalars, compute: Callable[[bool], None]
    ) -> None:
        """Runs `compute(masked)`, unmasked if every score of the blocks counts."""
        if self.has_segments:
            pl.when(step.runs)(functools.partial(compute, True))
            return
        edge = self._on_edge(step, self._limit(scalars))
        if edge is None:
            pl.when(step.runs)(functools.partial(compute, False))
            return
        pl.when(step.runs & edge)(functools.partial(compute, True))
        pl.when(step.runs & ~edge)(functools.partial(compute, False))

    def scores(self, product: Array, pair: Pair) -> tuple[Array, Array | None]:
        """Scores in units of log 2, and the derivative of the soft-cap."""
        scores, damping = self._capped(product)
        slopes = pair.scalars.slopes
        if not pair.kind and slopes is None:
            return scores, damping
        step = pair.step
        distance = self._distance(step, product.shape) + pair.offset
        far = distance if self.options.causal else jnp.abs(distance)
        if slopes is not None:
            slope = slopes[step.head] * LOG2_E
            scores = scores - slope * far.astype(jnp.float32)
        if not pair.kind:
            return scores, damping
        seen = self._seen(pair, distance, far)
        return scores if seen is None else jnp.where(seen, scores, MASKED), damping

    def _capped(self, product: Array) -> tuple[Array, Array | None]:
        cap = self.options.softcap
        if cap is None:
            return product * (self.scale * LOG2_E), None
        bounded = jnp.tanh(product * (self.scale / cap))
        return bounded * (cap * LOG2_E), 1 - bounded * bounded

    def _seen(self, pair: Pair, distance: Array, far: Array) -> Array | None:
        """Whether each score counts; None: all do."""
        conditions = []
        if self.options.causal:
            conditions.append(distance >= 0)
        elif self._padded:
            conditions.append(self._keys(pair.step, distance.shape) < self.tokens)
        limit = self._limit(pair.scalars)
        if limit is not None:
            conditions.append(far < limit)
        if self.has_segments:
            (rows,), (columns,) = pair.rows, pair.columns
            conditions.append(spread(rows, distance.shape[1]) == columns)
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def _limit(self, scalars: Scalars) -> Index | None:
        return scalars.window[0] if self.grid.dynamic_window else self._blocks.window

    @property
    def _blocks(self) -> Any:
        return self.grid.schedule.blocks

    @property
    def _padded(self) -> bool:
        return self._blocks.length > self.tokens

    def _keys(self, step: Step, shape: tuple[int, ...]) -> Array:
        """Positions of the keys; those after the causal diagonal need no such check."""
        dim = 1 if self.grid.schedule.by_query else 0
        return lax.broadcasted_iota(jnp.int32, shape, dim) + step.key * self._blocks.key

    def _distance(self, step: Step, shape: tuple[int, ...]) -> Array:
        """Query position minus key position."""
        rows = lax.broadcasted_iota(jnp.int32, shape, 0)
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        local = rows - columns if self.grid.schedule.by_query else columns - rows
        return local + (step.query * self._blocks.query - step.key * self._blocks.key)

    def _on_edge(self, step: Step, limit: Index | None) -> Array | None:
        """Whether some key of the pair is not seen by some query; None: never."""
        first_query = step.query * self._blocks.query
        first_key = step.key * self._blocks.key
        last_query = first_query + self._blocks.query - 1
        last_key = first_key + self._blocks.key - 1
        conditions = []
        if self.options.causal:
            conditions.append(last_key > first_query)
        elif self._padded:
            conditions.append(last_key >= self.tokens)
        if limit is not None:
            conditions.append(last_query - first_key >= limit)
            if not self.options.causal:
                conditions.append(last_key - first_query >= limit)
        return functools.reduce(jnp.logical_or, conditions) if conditions else None
