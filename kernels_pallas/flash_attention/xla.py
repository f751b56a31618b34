"""Flash attention in plain JAX for any backend: blocks of scores, never all of them.

One loop visits the pairs of blocks of the lower triangle (of the band, under a static
window) and no others. It is a `while` loop rather than a scan, so that a checkpoint
policy that keeps the results of matmuls does not keep every block of scores.

Legend beside the usual B, S, G, K: R query heads per key head, N tokens of a block.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.flash_attention.inputs import Inputs, Options
from kernels_pallas.flash_attention.reference import MASKED
from kernels_pallas.flash_attention.schedule import Blocks

SCORES = 2**24
"""The most scores, over batch and heads, that a pair of blocks should have: 64 MiB."""


def block_size(length: int, rows: int) -> int:
    """Tokens in a block; `rows` is batch times heads. Short sequences are one block."""
    most = next((n for n in (512, 256) if rows * n * n <= SCORES), 128)
    blocks = -(-length // most)
    return length if blocks == 1 else -(-length // blocks // 8) * 8


def forward(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Attention and the log of the sum of exponentiated scores, float32."""
    problem = _Problem.of(options, inputs)
    q, k, v = problem.arrays
    pairs = jnp.asarray(problem.blocks.pairs())
    batch, length, groups, repeats, head_dim = q.shape
    n = problem.blocks.query
    highest = jnp.full((batch, groups, repeats, n), MASKED, jnp.float32)
    total = jnp.zeros((batch, groups, repeats, n), jnp.float32)
    summed = jnp.zeros((batch, groups, repeats, n, head_dim), jnp.float32)
    lse = jnp.zeros((batch, groups, repeats, length), jnp.float32)
    carry = (highest, total, summed, jnp.zeros_like(q), lse)
    start, start_total = problem.start()

    def visit(pair: Array, carry: Any) -> Any:
        highest, total, summed, out, lse = carry
        i, j = pair[0] * n, pair[1] * n
        # A new query block begins where the key blocks before it end: at its first.
        first = j == problem.first_key(i)
        scores, _ = problem.scores(_rows(q, i, n), _rows(k, j, n), i, j)
        before = jnp.where(first, start, highest)
        total = jnp.where(first, start_total, total)
        summed = jnp.where(first, 0.0, summed)
        highest = jnp.maximum(before, scores.max(axis=-1))
        shrink = jnp.exp(before - highest)
        weights = jnp.exp(scores - highest[..., None])
        total = total * shrink + weights.sum(axis=-1)
        product = jnp.einsum(
            "bgrst,btgk->bgrsk",
            weights.astype(v.dtype),
            _rows(v, j, n),
            preferred_element_type=jnp.float32,
        )
        summed = summed * shrink[..., None] + product
        # Written at every key block, right after the last: cheaper than a condition.
        block = (summed / total[..., None]).astype(out.dtype)
        out = lax.dynamic_update_slice_in_dim(out, block.transpose(0, 3, 1, 2, 4), i, 1)
        block = highest + jnp.log(total)
        lse = lax.dynamic_update_slice_in_dim(lse, block, i, 3)
        return highest, total, summed, out, lse

    *_, out, lse = _for_each(pairs, visit, carry, q)
    return problem.like_query(out), problem.like_lse(lse)


def backward(
    options: Options,
    inputs: Inputs,
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    d_out: Float[Array, "B S H K"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v; `delta` is the part of dscore that a row shares."""
    problem = _Problem.of(options, inputs)
    q, k, v = problem.arrays
    n = problem.blocks.query
    d_out = problem.grouped(d_out)
    lse, delta = problem.grouped_rows(lse), problem.grouped_rows(delta)
    pairs = jnp.asarray(problem.blocks.pairs())
    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))

    def visit(pair: Array, carry: Any) -> Any:
        dq, dk, dv = carry
        i, j = pair[0] * n, pair[1] * n
        q_block, k_block, v_block = _rows(q, i, n), _rows(k, j, n), _rows(v, j, n)
        d_block = _rows(d_out, i, n)
        scores, damping = problem.scores(q_block, k_block, i, j)
        lse_block = lax.dynamic_slice_in_dim(lse, i, n, 3)
        delta_block = lax.dynamic_slice_in_dim(delta, i, n, 3)
        weights = jnp.exp(scores - lse_block[..., None])
        d_weights = _dot("bsgrk,btgk->bgrst", d_block, v_block)
        d_scores = options.scale * weights * (d_weights - delta_block[..., None])
        if damping is not None:
            d_scores = d_scores * damping
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        dq = _add(dq, _dot("bgrst,btgk->bsgrk", d_scores, k_block), i)
        dk = _add(dk, _dot("bgrst,bsgrk->btgk", d_scores, q_block), j)
        dv = _add(dv, _dot("bgrst,bsgrk->btgk", weights, d_block), j)
        return dq, dk, dv

    dq, dk, dv = _for_each(pairs, visit, carry, q)
    length = inputs.q.shape[1]
    dk, dv = dk[:, :length].astype(k.dtype), dv[:, :length].astype(v.dtype)
    return problem.like_query(dq.astype(q.dtype)), dk, dv


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Padded arrays, queries in groups: q [B, S, G, R, K], k and v [B, S, G, K]."""

    options: Options
    inputs: Inputs
    blocks: Blocks
    arrays: tuple[Array, Array, Array]
    segments: Array | None

    @classmethod
    def of(cls, options: Options, inputs: Inputs) -> "_Problem":
        batch, length, heads, head_dim = inputs.q.shape
        groups = inputs.k.shape[2]
        size = block_size(length, batch * heads)
        padded = math.ceil(length / size) * size
        q, k, v = (pad_dim(x, 1, padded) for x in (inputs.q, inputs.k, inputs.v))
        q = q.reshape(batch, padded, groups, heads // groups, head_dim)
        segments = inputs.segments
        if segments is not None:
            segments = pad_dim(segments, 1, padded)
        blocks = Blocks(padded, size, size, options.window, options.causal)
        return cls(options, inputs, blocks, (q, k, v), segments)

    def first_key(self, i: Array) -> Array:
        """First token of the first key block that the query block from `i` visits."""
        size = self.blocks.query
        first, _ = self.blocks.keys_of(i // size, self.blocks.window)
        return first * size

    def start(self) -> tuple[Array | float, float]:
        """Highest score and sum of a row before its first key: those of the sink."""
        if self.inputs.sinks is None:
            return MASKED, 0.0
        groups, repeats = self.arrays[0].shape[2:4]
        return self.inputs.sinks.reshape(groups, repeats, 1), 1.0

    def scores(
        self, q: Array, k: Array, i: Array, j: Array
    ) -> tuple[Array, Array | None]:
        """Masked float32 scores [B, G, R, N, N] of the blocks that begin at i and j.

        Beside them the derivative of the soft-cap, if there is one.
        """
        scores, damping = self.options.scale * _dot("bsgrk,btgk->bgrst", q, k), None
        if self.options.softcap is not None:
            bounded = jnp.tanh(scores / self.options.softcap)
            scores, damping = self.options.softcap * bounded, 1 - bounded * bounded
        n = self.blocks.query
        place = jnp.arange(n, dtype=jnp.int32)
        distance = (i - j) + place[:, None] - place[None, :]
        if self.inputs.slopes is not None:
            slopes = self.inputs.slopes.reshape(scores.shape[1:3])
            penalty = slopes[..., None, None] * jnp.abs(distance).astype(jnp.float32)
            scores = scores - penalty[None]
        seen = self._seen(distance, j + place)[None]
        if self.segments is not None:
            rows, columns = _rows(self.segments, i, n), _rows(self.segments, j, n)
            seen = seen & (rows[:, :, None] == columns[:, None, :])
        return jnp.where(seen[:, None, None], scores, MASKED), damping

    def _seen(self, distance: Array, key_place: Array) -> Array:
        """Which keys [N] a query [N] sees, but for segments."""
        if self.options.causal:
            seen = distance >= 0
        else:
            seen = jnp.broadcast_to(key_place < self.inputs.k.shape[1], distance.shape)
        if self.inputs.window is None:
            return seen
        return seen & (jnp.abs(distance) < self.inputs.window)

    def grouped(self, x: Array) -> Array:
        """An array like the output, in the layout of q."""
        q = self.arrays[0]
        return pad_dim(x, 1, q.shape[1]).reshape(q.shape)

    def grouped_rows(self, x: Array) -> Array:
        """One number per query, [B, H, S], as [B, G, R, S] padded."""
        batch, length, groups, repeats, _ = self.arrays[0].shape
        return pad_dim(x, 2, length).reshape(batch, groups, repeats, length)

    def like_query(self, x: Array) -> Array:
        """From the layout of q back to the caller's [B, S, H, K]."""
        length = self.inputs.q.shape[1]
        return x[:, :length].reshape(self.inputs.q.shape)

    def like_lse(self, x: Array) -> Array:
        """From [B, G, R, S] padded back to the caller's [B, H, S]."""
        batch, length, heads, _ = self.inputs.q.shape
        return x[..., :length].reshape(batch, heads, length)


def _for_each(pairs: Array, visit: Any, carry: Any, like: Array) -> Any:
    """`carry` after `visit(pair, carry)` for every row of `pairs`."""
    carry = jax.tree.map(lambda x: vary_like(x, like), carry)

    def body(state: Any) -> Any:
        step, carry = state
        return step + 1, visit(pairs[step], carry)

    start = (jnp.int32(0), carry)
    return lax.while_loop(lambda state: state[0] < len(pairs), body, start)[1]


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _rows(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, 1)


def _add(x: Array, update: Array, start: Array) -> Array:
    """`x` with `update` added to its rows from `start` on."""
    rows = _rows(x, start, update.shape[1])
    return lax.dynamic_update_slice_in_dim(x, rows + update, start, 1)
