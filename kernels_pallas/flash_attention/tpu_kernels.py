"""The bodies of the TPU kernels: what happens to one pair of blocks.

Which pairs there are, and which of their scores count, a `Rule` says; attention with
other masks brings a rule of its own and uses these bodies.

Scores are in units of log 2, because the hardware exponentiates with base 2. Numbers
that belong to tokens, one each, lie along lanes in HBM, [1, N]. Those of the tokens in
the rows of the scores are turned once per accumulation into columns, repeated over the
128 lanes; those of the tokens in the columns of the scores are used as they lie.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.flash_attention.reference import MASKED

LANES = 128
FORWARD_ROWS = 512
"""Queries that go through the softmax together: the next ones' matmul overlaps it."""
LOG2_E = math.log2(math.e)
Ref = Any

_OUTER = (((1,), (1,)), ((), ()))  # [M, K] [N, K] -> [M, N]
_INNER = (((1,), (0,)), ((), ()))  # [M, K] [K, N] -> [M, N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What a kernel reads: arrays where it is called, blocks of them inside.

    Attributes:
        q, k, v: [N, K] of a head.
        query_marks, key_marks: int32, [1, N] each, numbers of the tokens that masks
            depend on; their meaning is the rule's.
        table: further numbers that the rule needs for the pair, or None.
        d_out: gradient of the output; None in the forward kernel, as the next two.
        lse, delta: float32 [1, N], the logs of the normalisers, and the part of dscore
            that a row shares.
    """

    q: Any
    k: Any
    v: Any
    query_marks: tuple[Any, ...] = ()
    key_marks: tuple[Any, ...] = ()
    table: Any = None
    d_out: Any = None
    lse: Any = None
    delta: Any = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """The scores in work: which they are, and what masks need to know of them.

    Attributes:
        step: the rule's own description of the grid step.
        scalars: the kernel's scalar arguments.
        rows: marks of the tokens in the rows, [rows, LANES] each.
        columns: marks of the tokens in the columns, [1, columns] each.
        table: as in `Given`.
        kind: what `Rule.when_needed` called the computation with.
        offset: where in its block the first row is.
    """

    step: Any
    scalars: Any
    rows: tuple[Array, ...]
    columns: tuple[Array, ...]
    table: Ref
    kind: Any
    offset: int = 0


class Rule(Protocol):
    """The pairs of blocks of a kernel, and the scores of a pair."""

    @property
    def scale(self) -> float:
        """Factor of the scores, natural units."""
        ...

    @property
    def sees_nothing(self) -> bool:
        """Whether a query may have no key. Its output is 0 then, its lse MASKED."""
        ...

    def here(self, scalars: Any) -> Any:
        """The grid step that the kernel is in, with `first` and `last`."""
        ...

    def when_needed(self, step: Any, scalars: Any, compute: Callable) -> None:
        """Runs `compute(kind)` for the kind of masks that the step needs, if any."""
        ...

    def start(self, step: Any, scalars: Any) -> tuple[Array | float, float]:
        """Highest score, units of log 2, and sum of a row before its first key."""
        ...

    def scores(self, product: Array, pair: Pair) -> tuple[Array, Array | None]:
        """Scores in units of log 2 from the products of queries and keys.

        Args:
            product: float32, queries in rows and keys in columns if the kernel
                accumulates over keys, the other way round if it does over queries.
            pair: which they are.

        Returns:
            the scores, MASKED where they do not count, and the derivative of what was
            done to them beside scaling, or None for 1.
        """
        ...


def forward(
    rule: Rule,
    scalars: Any,
    given: Given,
    out: Ref,
    lse: Ref,
    sums: tuple[Ref, ...],
    columns: tuple[Ref, ...],
) -> None:
    """Online softmax (Dao, 2023, algorithm 1): one key block into a query block."""
    highest, total, summed = sums
    step = rule.here(scalars)

    @pl.when(step.first)
    def _() -> None:
        start, start_total = rule.start(step, scalars)
        highest[...] = jnp.full_like(highest, start)
        total[...] = jnp.full_like(total, start_total)
        summed[...] = jnp.zeros_like(summed)
        _turn(given.query_marks, columns)

    def compute_rows(rows: Any, offset: int, kind: Any) -> None:
        product = _dot(given.q[rows], given.k[...], _OUTER)
        marks = tuple(column[rows] for column in columns)
        pair = Pair(
            step, scalars, marks, _read(given.key_marks), given.table, kind, offset
        )
        scores, _ = rule.scores(product, pair)
        before = highest[rows]
        now = jnp.maximum(before, scores.max(axis=1)[:, None])
        weights = jnp.exp2(scores - spread(now, scores.shape[1]))
        shrink = jnp.exp2(before - now)
        highest[rows] = now
        total[rows] = total[rows] * shrink + weights.sum(axis=1)[:, None]
        added = _dot(weights.astype(given.v.dtype), given.v[...], _INNER)
        summed[rows] = summed[rows] * spread(shrink, added.shape[1]) + added

    def compute(kind: Any) -> None:
        for start in range(0, given.q.shape[0], FORWARD_ROWS):
            size = min(FORWARD_ROWS, given.q.shape[0] - start)
            compute_rows(pl.ds(start, size), start, kind)

    rule.when_needed(step, scalars, compute)

    @pl.when(step.last)
    def _() -> None:
        result = summed[...] / spread(total[...], out.shape[1])
        logs = highest[...] / LOG2_E + jnp.log(total[...])
        if rule.sees_nothing:
            some = highest[...] > MASKED / 2
            logs = jnp.where(some, logs, MASKED)
            wide = spread(highest[...], out.shape[1]) > MASKED / 2
            result = jnp.where(wide, result, 0.0)
        out[...] = result.astype(out.dtype)
        lse[...] = _row(logs)


def query_gradient(
    rule: Rule,
    scalars: Any,
    given: Given,
    dq: Ref,
    sums: tuple[Ref, ...],
    columns: tuple[Ref, ...],
) -> None:
    """dq of a query block: what one key block adds to it."""
    summed, lse, delta = sums
    step = rule.here(scalars)

    @pl.when(step.first)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        lse[...] = _column(given.lse[...] * LOG2_E)
        delta[...] = _column(given.delta[...])
        _turn(given.query_marks, columns)

    def compute(kind: Any) -> None:
        marks = (_read(columns), _read(given.key_marks))
        pair = Pair(step, scalars, *marks, given.table, kind)
        product = _dot(given.q[...], given.k[...], _OUTER)
        width = product.shape[1]
        weights, damping = _weights(rule, product, pair, spread(lse[...], width))
        d_weights = _dot(given.d_out[...], given.v[...], _OUTER)
        d_scores = weights * (d_weights - spread(delta[...], width))
        d_scores = d_scores if damping is None else d_scores * damping
        summed[...] += _dot(d_scores.astype(given.k.dtype), given.k[...], _INNER)

    rule.when_needed(step, scalars, compute)

    @pl.when(step.last)
    def _() -> None:
        dq[...] = (summed[...] * rule.scale).astype(dq.dtype)


def key_gradient(
    rule: Rule,
    scalars: Any,
    given: Given,
    dk: Ref,
    dv: Ref,
    sums: tuple[Ref, ...],
    columns: tuple[Ref, ...],
) -> None:
    """dk and dv of a key block: what one query block adds. Scores are transposed."""
    dk_summed, dv_summed = sums
    step = rule.here(scalars)

    @pl.when(step.first)
    def _() -> None:
        dk_summed[...] = jnp.zeros_like(dk_summed)
        dv_summed[...] = jnp.zeros_like(dv_summed)
        _turn(given.key_marks, columns)

    def compute(kind: Any) -> None:
        marks = (_read(columns), _read(given.query_marks))
        pair = Pair(step, scalars, *marks, given.table, kind)
        product = _dot(given.k[...], given.q[...], _OUTER)
        weights, damping = _weights(rule, product, pair, given.lse[...] * LOG2_E)
        d_out = given.d_out[...]
        dv_summed[...] += _dot(weights.astype(d_out.dtype), d_out, _INNER)
        d_weights = _dot(given.v[...], d_out, _OUTER)
        d_scores = weights * (d_weights - given.delta[...])
        d_scores = d_scores if damping is None else d_scores * damping
        dk_summed[...] += _dot(d_scores.astype(given.q.dtype), given.q[...], _INNER)

    rule.when_needed(step, scalars, compute)

    @pl.when(step.last)
    def _() -> None:
        dk[...] = (dk_summed[...] * rule.scale).astype(dk.dtype)
        dv[...] = dv_summed[...].astype(dv.dtype)


def spread(column: Array, width: int) -> Array:
    """[N, LANES] that repeats along lanes, as [N, width]."""
    repeats = -(-width // LANES)
    return jnp.concatenate([column] * repeats, axis=1)[:, :width]


def _weights(
    rule: Rule, product: Array, pair: Pair, lse: Array
) -> tuple[Array, Array | None]:
    """The softmax, with lse in units of log 2, and the factor that dscore needs."""
    scores, damping = rule.scores(product, pair)
    return jnp.exp2(scores - lse), damping


def _dot(x: Array, y: Array, dims: Any) -> Array:
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _column(row: Array) -> Array:
    """[1, N] as [N, LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column: Array) -> Array:
    """[N, LANES] as [1, N]."""
    return column.T[:1]


def _turn(rows: tuple[Ref, ...], columns: tuple[Ref, ...]) -> None:
    """Keeps each of `rows` in its scratch of `columns`."""
    for row, column in zip(rows, columns, strict=True):
        column[...] = _column(row[...])


def _read(marks: tuple[Ref, ...]) -> tuple[Array, ...]:
    return tuple(mark[...] for mark in marks)
