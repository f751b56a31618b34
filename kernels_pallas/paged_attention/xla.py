"""Paged attention in plain JAX: a loop over blocks of queries and of pages.

The blocks are those of the TPU kernel: a block of queries of one sequence meets the
pages that it sees, and no others.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.grouped_matmul import schedule
from kernels_pallas.paged_attention import plan
from kernels_pallas.paged_attention.inputs import Inputs, Options
from kernels_pallas.paged_attention.span import Span

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(options: Options, inputs: Inputs) -> Float[Array, "T H K"]:
    """Online softmax over the pages, float32."""
    blocks = plan.blocks(inputs)
    tokens, sequences = inputs.q.shape[0], inputs.lengths.shape[0]
    steps = schedule.of_outputs(inputs.counts, tokens, blocks.queries)
    padded = -(-tokens // blocks.queries) * blocks.queries
    q = pad_dim(inputs.q, 0, padded)

    def visit(step: Array, out: Array) -> Array:
        sequence, tile = steps.group[step], steps.tile[step]
        first = tile * blocks.queries
        row = first + jnp.arange(blocks.queries, dtype=jnp.int32)
        start, end = steps.start[sequence], steps.end[sequence]
        span = Span(blocks, options.window, start, end, inputs.lengths[sequence])
        part = lax.dynamic_slice_in_dim(q, first, blocks.queries)
        result = _attend(options, inputs, span, sequence, tile, part)
        before = lax.dynamic_slice_in_dim(out, first, blocks.queries)
        mine = (row >= start) & (row < end)
        result = jnp.where(mine[:, None, None], result.astype(out.dtype), before)
        return lax.dynamic_update_slice_in_dim(out, result, first, 0)

    zeros = vary_like(jnp.zeros_like(q), q, inputs.pages, inputs.table)
    # The visits of rows without a sequence, which stay zero, are the last ones.
    place = jnp.arange(steps.group.shape[0], dtype=jnp.int32)
    real = (steps.group < sequences) & (place < steps.count[0])
    count = real.sum(dtype=jnp.int32)
    return lax.fori_loop(jnp.int32(0), count, visit, zeros)[:tokens]


def _attend(
    options: Options, inputs: Inputs, span: Span, sequence: Array, tile: Array, q: Array
) -> Float[Array, "B H K"]:
    """The queries of a block with the keys of a sequence."""
    count, heads, head_dim = q.shape
    groups, shared = inputs.groups, inputs.shared
    q = q.reshape(count, groups, shared, head_dim).swapaxes(0, 1)
    q = q.reshape(groups, count * shared, head_dim)
    pages, slots = span.blocks.pages, inputs.table.shape[1]
    row = tile * count + jnp.arange(count * shared, dtype=jnp.int32) // shared
    position = span.position(row)[:, None]
    scales = inputs.scales[:, :, None, None]

    def visit(chunk: Array, state: tuple[Array, Array, Array]) -> tuple:
        highest, total, summed = state
        slot = chunk * pages + jnp.arange(pages, dtype=jnp.int32)
        page = inputs.table[sequence, jnp.minimum(slot, slots - 1)]
        own = jnp.moveaxis(inputs.pages[page].astype(q.dtype), 0, 2)
        own = own.reshape(groups, 2, span.blocks.keys, head_dim)
        key = chunk * span.blocks.keys + jnp.arange(span.blocks.keys, dtype=jnp.int32)
        scores = _dot("gmk,gjk->gmj", q, own[:, 0]) * (options.scale * scales[:, 0])
        scores = jnp.where(span.sees(position, key[None]), scores, MASKED)
        now = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - now[..., None])
        shrink = jnp.exp(highest - now)
        values = jnp.where((key < span.length)[:, None], own[:, 1], 0)
        added = _dot("gmj,gjk->gmk", weights.astype(q.dtype), values)
        total = total * shrink + weights.sum(axis=-1)
        return now, total, summed * shrink[..., None] + added

    state = (
        jnp.full(q.shape[:2], MASKED, jnp.float32),
        jnp.zeros(q.shape[:2], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    state = tuple(vary_like(x, q, inputs.pages, inputs.table) for x in state)
    begin, end = span.chunks(tile)
    _, total, summed = lax.fori_loop(begin, end, visit, state)
    out = summed / jnp.where(total == 0, 1.0, total)[..., None] * scales[:, 1]
    out = out.reshape(groups, count, shared, head_dim).swapaxes(0, 1)
    return out.reshape(count, heads, head_dim)


def _dot(dims: str, x: Array, y: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        dims, x, y, precision=precision, preferred_element_type=jnp.float32
    )
