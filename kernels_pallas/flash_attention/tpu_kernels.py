"""The bodies of the TPU kernels: what happens to one pair of blocks.

Scores are in units of log 2, because the hardware exponentiates with base 2. Numbers
that belong to queries, one each, lie along lanes in HBM, [1, N]. A kernel whose queries
are rows of the scores turns them once per query block into columns, repeated over the
128 lanes; the kernel of the key gradients has its queries along lanes to begin with.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.flash_attention.reference import MASKED
from kernels_pallas.flash_attention.schedule import Index
from kernels_pallas.flash_attention.tpu_grid import Grid, Step

LANES = 128
FORWARD_ROWS = 512
"""Queries that go through the softmax together: the next ones' matmul overlaps it."""
LOG2_E = math.log2(math.e)
Ref = Any

_OUTER = (((1,), (1,)), ((), ()))  # [M, K] [N, K] -> [M, N]
_INNER = (((1,), (0,)), ((), ()))  # [M, K] [K, N] -> [M, N]


@dataclasses.dataclass(frozen=True)
class Masking:
    """Scores of a pair of blocks, and which of them count.

    Attributes:
        grid: the kernel's grid.
        scale: factor of the scores, natural units.
        has_slopes, has_segments: whether the kernel is given them.
    """

    grid: Grid
    scale: float
    has_slopes: bool
    has_segments: bool

    def when_needed(
        self, step: Step, window: Ref, compute: Callable[[bool], None]
    ) -> None:
        """Runs `compute(masked)`, unmasked if every score of the blocks counts."""
        if self.has_segments:
            pl.when(step.runs)(functools.partial(compute, True))
            return
        edge = self._on_edge(step, self._limit(window))
        pl.when(step.runs & edge)(functools.partial(compute, True))
        pl.when(step.runs & ~edge)(functools.partial(compute, False))

    def scores(
        self,
        product: Array,
        step: Step,
        scalars: tuple[Ref, Ref],
        segments: tuple[Array, Array] | None,
        *,
        masked: bool,
        offset: int = 0,
    ) -> Array:
        """Scores in units of log 2 from the products of queries and keys.

        Args:
            product: float32, queries in rows and keys in columns if the kernel
                accumulates over keys, the other way round if it does over queries.
            step: which blocks they are.
            scalars: the kernel's window and slopes.
            segments: those of the rows, [rows, LANES], and of the columns [1, columns].
            masked: whether some of them may not count.
            offset: where in its block the first row is.
        """
        window, slopes = scalars
        scores = product * (self.scale * LOG2_E)
        if not masked and not self.has_slopes:
            return scores
        distance = self._distance(step, product.shape) + offset
        if self.has_slopes:
            slope = slopes[step.head] * LOG2_E
            scores = scores - slope * distance.astype(jnp.float32)
        if not masked:
            return scores
        seen = distance >= 0
        limit = self._limit(window)
        if limit is not None:
            seen = seen & (distance < limit)
        if segments is not None:
            rows, columns = segments
            seen = seen & (spread(rows, product.shape[1]) == columns)
        return jnp.where(seen, scores, MASKED)

    def _limit(self, window: Ref) -> Index | None:
        return window[0] if self.grid.dynamic_window else self._blocks.window

    @property
    def _blocks(self) -> Any:
        return self.grid.schedule.blocks

    def _distance(self, step: Step, shape: tuple[int, ...]) -> Array:
        """Query position minus key position."""
        rows = lax.broadcasted_iota(jnp.int32, shape, 0)
        columns = lax.broadcasted_iota(jnp.int32, shape, 1)
        local = rows - columns if self.grid.schedule.by_query else columns - rows
        return local + (step.query * self._blocks.query - step.key * self._blocks.key)

    def _on_edge(self, step: Step, limit: Index | None) -> Array:
        """Whether a key comes after a query, or is out of its window."""
        first_query = step.query * self._blocks.query
        first_key = step.key * self._blocks.key
        edge = first_key + self._blocks.key - 1 > first_query
        if limit is None:
            return edge
        return edge | (first_query + self._blocks.query - 1 - first_key >= limit)


def forward(
    masking: Masking,
    window: Ref,
    slopes: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    q_segments: Ref | None,
    k_segments: Ref | None,
    out: Ref,
    lse: Ref,
    highest: Ref,
    total: Ref,
    summed: Ref,
    segment_column: Ref | None = None,
) -> None:
    """Online softmax (Dao, 2023, algorithm 1): one key block into a query block."""
    step = masking.grid.here(window)

    @pl.when(step.first)
    def _() -> None:
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)
        _keep_column(q_segments, segment_column)

    def compute_rows(rows: Any, offset: int, masked: bool) -> None:
        product = _dot(q[rows], k[...], _OUTER)
        column = None if segment_column is None else segment_column.at[rows]
        scores = masking.scores(
            product,
            step,
            (window, slopes),
            _segments(column, k_segments),
            masked=masked,
            offset=offset,
        )
        before = highest[rows]
        now = jnp.maximum(before, scores.max(axis=1)[:, None])
        weights = jnp.exp2(scores - spread(now, scores.shape[1]))
        shrink = jnp.exp2(before - now)
        highest[rows] = now
        total[rows] = total[rows] * shrink + weights.sum(axis=1)[:, None]
        added = _dot(weights.astype(v.dtype), v[...], _INNER)
        summed[rows] = summed[rows] * spread(shrink, added.shape[1]) + added

    def compute(masked: bool) -> None:
        for start in range(0, q.shape[0], FORWARD_ROWS):
            size = min(FORWARD_ROWS, q.shape[0] - start)
            compute_rows(pl.ds(start, size), start, masked)

    masking.when_needed(step, window, compute)

    @pl.when(step.last)
    def _() -> None:
        out[...] = (summed[...] / spread(total[...], out.shape[1])).astype(out.dtype)
        lse[...] = _row(highest[...] / LOG2_E + jnp.log(total[...]))


def query_gradient(
    masking: Masking,
    window: Ref,
    slopes: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    q_segments: Ref | None,
    k_segments: Ref | None,
    d_out: Ref,
    lse: Ref,
    delta: Ref,
    dq: Ref,
    summed: Ref,
    lse_column: Ref,
    delta_column: Ref,
    segment_column: Ref | None = None,
) -> None:
    """dq of a query block: what one key block adds to it."""
    step = masking.grid.here(window)

    @pl.when(step.first)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        lse_column[...] = _column(lse[...] * LOG2_E)
        delta_column[...] = _column(delta[...])
        _keep_column(q_segments, segment_column)

    def compute(masked: bool) -> None:
        segments = _segments(segment_column, k_segments)
        product = _dot(q[...], k[...], _OUTER)
        scores = masking.scores(
            product, step, (window, slopes), segments, masked=masked
        )
        weights = jnp.exp2(scores - spread(lse_column[...], scores.shape[1]))
        d_weights = _dot(d_out[...], v[...], _OUTER)
        d_scores = weights * (d_weights - spread(delta_column[...], scores.shape[1]))
        summed[...] += _dot(d_scores.astype(k.dtype), k[...], _INNER)

    masking.when_needed(step, window, compute)

    @pl.when(step.last)
    def _() -> None:
        dq[...] = (summed[...] * masking.scale).astype(dq.dtype)


def key_gradient(
    masking: Masking,
    window: Ref,
    slopes: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    q_segments: Ref | None,
    k_segments: Ref | None,
    d_out: Ref,
    lse: Ref,
    delta: Ref,
    dk: Ref,
    dv: Ref,
    dk_summed: Ref,
    dv_summed: Ref,
    segment_column: Ref | None = None,
) -> None:
    """dk and dv of a key block: what one query block adds. Scores are transposed."""
    step = masking.grid.here(window)

    @pl.when(step.first)
    def _() -> None:
        dk_summed[...] = jnp.zeros_like(dk_summed)
        dv_summed[...] = jnp.zeros_like(dv_summed)
        _keep_column(k_segments, segment_column)

    def compute(masked: bool) -> None:
        segments = _segments(segment_column, q_segments)
        product = _dot(k[...], q[...], _OUTER)
        scores = masking.scores(
            product, step, (window, slopes), segments, masked=masked
        )
        weights = jnp.exp2(scores - lse[...] * LOG2_E)
        dv_summed[...] += _dot(weights.astype(d_out.dtype), d_out[...], _INNER)
        d_weights = _dot(v[...], d_out[...], _OUTER)
        d_scores = weights * (d_weights - delta[...])
        dk_summed[...] += _dot(d_scores.astype(q.dtype), q[...], _INNER)

    masking.when_needed(step, window, compute)

    @pl.when(step.last)
    def _() -> None:
        dk[...] = (dk_summed[...] * masking.scale).astype(dk.dtype)
        dv[...] = dv_summed[...].astype(dv.dtype)


def spread(column: Array, width: int) -> Array:
    """[N, LANES] that repeats along lanes, as [N, width]."""
    repeats = -(-width // LANES)
    return jnp.concatenate([column] * repeats, axis=1)[:, :width]


def _dot(x: Array, y: Array, dims: Any) -> Array:
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _column(row: Array) -> Array:
    """[1, N] as [N, LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column: Array) -> Array:
    """[N, LANES] as [1, N]."""
    return column.T[:1]


def _keep_column(row: Ref | None, column: Ref | None) -> None:
    if row is not None and column is not None:
        column[...] = _column(row[...])


def _segments(column: Ref | None, row: Ref | None) -> tuple[Array, Array] | None:
    return None if column is None or row is None else (column[...], row[...])
