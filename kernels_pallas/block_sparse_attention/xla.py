"""Block-sparse attention in plain JAX for any backend: listed keys are gathered.

Rows of cells with lists of about one length go together, a few at a time, so that work
goes with the blocks listed and memory is bounded. The loop is a `while` loop rather
than a scan, so that a checkpoint policy that keeps the results of matmuls does not keep
every block of scores.

Legend beside the usual B, S, H, G, K: N cells in a sequence, s or t tokens of a cell, C
rows at once, L cells in their lists, X heads that differ in keys or lists, R heads for
each of them that do not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.block_sparse_attention.inputs import Inputs, Options
from kernels_pallas.block_sparse_attention.rows import Rows, cell_size, rows_by_length
from kernels_pallas.flash_attention.reference import MASKED

ENTRIES = 2**24
"""The most scores, or gathered numbers, that rows worked on together should have."""


def forward(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Attention and the log of the sum of exponentiated scores, float32."""
    problem = _Problem.of(options, inputs)
    out = jnp.zeros_like(problem.q)
    lse = jnp.full(problem.q.shape[:-1], MASKED, jnp.float32)

    def visit(work: _Work, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        scores = problem.scores(work)
        highest = scores.max(axis=(-2, -1))
        some = highest > MASKED / 2
        weights = jnp.exp(scores - highest[..., None, None])
        total = weights.sum(axis=(-2, -1))
        values = problem.keys(problem.v, work)
        block = _dot("cxrbslt,xclbtk->cxrbsk", weights.astype(values.dtype), values)
        block = jnp.where(some[..., None], block / total[..., None], 0.0)
        logs = jnp.where(some, highest + jnp.log(total), MASKED)
        out = out.at[work.rows].set(block.astype(out.dtype), mode="drop")
        return out, lse.at[work.rows].set(logs, mode="drop")

    out, lse = problem.for_each_row(visit, (out, lse))
    return problem.ungrouped(out), problem.ungrouped_rows(lse)


def backward(
    options: Options,
    inputs: Inputs,
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    d_out: Float[Array, "B S H K"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; `delta` is the part of dscore that a row shares."""
    problem = _Problem.of(options, inputs)
    d_out = problem.grouped(d_out)
    lse, delta = problem.grouped_rows(lse), problem.grouped_rows(delta)
    carry = tuple(
        jnp.zeros(x.shape, jnp.float32) for x in (problem.q, problem.k, problem.v)
    )

    def visit(work: _Work, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dq, dk, dv = carry
        keys, values = problem.keys(problem.k, work), problem.keys(problem.v, work)
        queries, d_rows = _rows(problem.q, work), _rows(d_out, work)
        weights = jnp.exp(problem.scores(work) - _rows(lse, work)[..., None, None])
        d_weights = _dot("cxrbsk,xclbtk->cxrbslt", d_rows, values)
        d_scores = d_weights - _rows(delta, work)[..., None, None]
        d_scores = (options.scale * weights * d_scores).astype(keys.dtype)
        weights = weights.astype(keys.dtype)
        block = _dot("cxrbslt,xclbtk->cxrbsk", d_scores, keys)
        dq = dq.at[work.rows].set(block, mode="drop")
        block = _dot("cxrbslt,cxrbsk->xclbtk", d_scores, queries)
        dk = dk.at[problem.places(work)].add(block)
        block = _dot("cxrbslt,cxrbsk->xclbtk", weights, d_rows)
        return dq, dk, dv.at[problem.places(work)].add(block)

    dq, dk, dv = problem.for_each_row(visit, carry)
    dtype = inputs.q.dtype
    dk, dv = problem.ungrouped_keys(dk), problem.ungrouped_keys(dv)
    return problem.ungrouped(dq).astype(dtype), dk.astype(dtype), dv.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Rows that are worked on together.

    Attributes:
        rows: which they are; N for none.
        lists: their keys; -1 for none.
    """

    rows: Int[Array, " C"]
    lists: Int[Array, "X C L"]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Cells before heads: q [N, X, R, B, s, K], k and v [G, N, B, t, K]."""

    options: Options
    inputs: Inputs
    cell: int
    q: Array
    k: Array
    v: Array
    segments: Array | None

    @classmethod
    def of(cls, options: Options, inputs: Inputs) -> "_Problem":
        cell = cell_size(options.mask.block)
        segments = inputs.segments
        if segments is not None:
            segments = _cells(segments, 1, cell).swapaxes(0, 1)  # [N, B, s]
        k, v = (
            _cells(x, 1, cell).transpose(3, 1, 0, 2, 4) for x in (inputs.k, inputs.v)
        )
        given = cls(options, inputs, cell, inputs.q, k, v, segments)
        return dataclasses.replace(given, q=given.grouped(inputs.q))

    @property
    def heads(self) -> tuple[int, int]:
        """X and R."""
        heads, groups = self.inputs.q.shape[2], self.inputs.k.shape[2]
        repeats = heads // groups
        alike = self.options.mask.pattern.alike(repeats)
        return (groups, repeats) if alike else (heads, 1)

    def group_of(self) -> Int[Array, " X"]:
        """The key head of each of the X."""
        each, _ = self.heads
        return jnp.arange(each) // (each // self.inputs.k.shape[2])

    def layouts(self) -> Int[Array, " X"]:
        """Which of the different layouts each of the X has."""
        of_head = np.array(self.options.mask.pattern.of_head, np.int32)
        each, repeats = self.heads
        if len(of_head) == 1:
            return jnp.zeros(each, jnp.int32)
        return jnp.asarray(of_head)[self.inputs.first_head + jnp.arange(each) * repeats]

    def for_each_row(self, visit: Callable[[_Work, Any], Any], carry: Any) -> Any:
        """`carry` after `visit` of all rows that list anything."""
        carry = jax.tree.map(lambda x: vary_like(x, self.inputs.q), carry)
        layouts = self.layouts()
        for rows in rows_by_length(self.options.mask):
            carry = self._for_each(rows, layouts, visit, carry)
        return carry

    def _for_each(
        self, rows: Rows, layouts: Array, visit: Callable[[_Work, Any], Any], carry: Any
    ) -> Any:
        count, length = rows.lists.shape[1:]
        each, repeats = self.heads
        batch, head_dim = self.inputs.q.shape[0], self.inputs.q.shape[3]
        # A score for each of R heads and s queries, and a key and a value.
        per_key = max(repeats * self.cell, 2 * head_dim)
        per_row = batch * each * length * self.cell * per_key
        together = min(max(ENTRIES // per_row, 1), count)
        steps = math.ceil(count / together)
        padded = steps * together - count
        numbers = np.pad(rows.rows, (0, padded), constant_values=len(self.q))
        lists = np.pad(rows.lists, ((0, 0), (0, padded), (0, 0)), constant_values=-1)
        numbers, lists = jnp.asarray(numbers), jnp.asarray(lists)

        def body(state: Any) -> Any:
            step, carry = state
            start = step * together
            mine = lax.dynamic_slice_in_dim(lists, start, together, 1)
            work = _Work(
                lax.dynamic_slice_in_dim(numbers, start, together), mine[layouts]
            )
            return step + 1, visit(work, carry)

        start = (jnp.int32(0), carry)
        return lax.while_loop(lambda state: state[0] < steps, body, start)[1]

    def places(self, work: _Work) -> tuple[Array, Array]:
        """Where in k and v the listed cells are, [X, C, L]; some cell for none."""
        lists = jnp.maximum(work.lists, 0)
        return jnp.broadcast_to(self.group_of()[:, None, None], lists.shape), lists

    def keys(self, x: Array, work: _Work) -> Array:
        """The listed cells of k or v, [X, C, L, B, t, K]."""
        return x[self.places(work)]

    def scores(self, work: _Work) -> Array:
        """Masked float32 scores [C, X, R, B, s, L, t] of the rows."""
        queries, keys = _rows(self.q, work), self.keys(self.k, work)
        scores = self.options.scale * _dot("cxrbsk,xclbtk->cxrbslt", queries, keys)
        place = jnp.arange(self.cell, dtype=jnp.int32)
        lists = work.lists.swapaxes(0, 1)  # [C, X, L]
        key = lists[..., None] * self.cell + place
        seen = ((lists >= 0)[..., None] & (key < self.options.mask.length))[:, :, None]
        if self.options.mask.causal:
            query = work.rows[:, None] * self.cell + place
            seen = seen & (query[:, None, :, None, None] >= key[:, :, None])
        seen = seen[:, :, None, None]
        if self.segments is not None:
            mine = _rows(self.segments, work)[:, None, :, :, None, None]
            theirs = self.segments[jnp.maximum(lists, 0)]  # [C, X, L, B, t]
            theirs = theirs.transpose(0, 1, 3, 2, 4)[:, :, :, None]
            seen = seen & (mine == theirs)[:, :, None]
        return jnp.where(seen, scores, MASKED)

    def grouped(self, x: Array) -> Array:
        """An array like q, [B, S, H, K], as [N, X, R, B, s, K]."""
        batch, _, _, head_dim = self.inputs.q.shape
        cells = _cells(x, 1, self.cell)  # [B, N, s, H, K]
        cells = cells.reshape(batch, -1, self.cell, *self.heads, head_dim)
        return cells.transpose(1, 3, 4, 0, 2, 5)

    def ungrouped(self, x: Array) -> Array:
        """[N, X, R, B, s, K] as [B, S, H, K]."""
        batch, length, heads, head_dim = self.inputs.q.shape
        x = x.transpose(3, 0, 4, 1, 2, 5).reshape(batch, -1, heads, head_dim)
        return x[:, :length]

    def grouped_rows(self, x: Array) -> Array:
        """One number per query, [B, H, S], as [N, X, R, B, s]."""
        cells = _cells(x, 2, self.cell)  # [B, H, N, s]
        cells = cells.reshape(len(x), *self.heads, -1, self.cell)
        return cells.transpose(3, 1, 2, 0, 4)

    def ungrouped_rows(self, x: Array) -> Array:
        """[N, X, R, B, s] as [B, H, S]."""
        batch, length, heads, _ = self.inputs.q.shape
        x = x.transpose(3, 1, 2, 0, 4).reshape(batch, heads, -1)
        return x[:, :, :length]

    def ungrouped_keys(self, x: Array) -> Array:
        """[G, N, B, t, K] as [B, S, G, K]."""
        batch, length, groups, head_dim = self.inputs.k.shape
        x = x.transpose(2, 1, 3, 0, 4).reshape(batch, -1, groups, head_dim)
        return x[:, :length]


def _cells(x: Array, axis: int, cell: int) -> Array:
    """`x` with its dim `axis` padded and split into cells."""
    count = math.ceil(x.shape[axis] / cell)
    x = pad_dim(x, axis, count * cell)
    return x.reshape(*x.shape[:axis], count, cell, *x.shape[axis + 1 :])


def _rows(x: Array, work: _Work) -> Array:
    """The rows of `x`, the last one for none."""
    return x[jnp.minimum(work.rows, len(x) - 1)]


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
