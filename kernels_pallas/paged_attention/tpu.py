"""Paged attention on TPU (Pallas Mosaic): decoding and prefill in one kernel.

Every grid step is a block of queries of one sequence. It walks over the pages that they
see, a few at a time, which are copied from HBM by the page table while the ones before
are worked on; the first pages of a step are on their way during the step before.
Blocks that hold queries of several sequences are visited once for each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.grouped_matmul import schedule
from kernels_pallas.paged_attention import plan, tpu_pages
from kernels_pallas.paged_attention.inputs import Inputs, Options
from kernels_pallas.paged_attention.plan import Blocks
from kernels_pallas.paged_attention.span import Span
from kernels_pallas.paged_attention.tpu_pages import Scalars

LANES = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
Ref = Any
_OUTER = (((1,), (1,)), ((), ()))  # [M, K] [N, K] -> [M, N]
_INNER = (((1,), (0,)), ((), ()))  # [M, K] [K, N] -> [M, N]


def attention(options: Options, inputs: Inputs) -> Float[Array, "T H K"]:
    """Online softmax over the pages, float32."""
    blocks = plan.blocks(inputs)
    tokens, heads, head_dim = inputs.q.shape
    groups, shared = inputs.groups, inputs.shared
    steps = schedule.of_outputs(inputs.counts, tokens, blocks.queries)
    rows = blocks.queries * shared
    kernel = _Kernel(options, blocks, shared, inputs.table.shape)
    # A key head's queries are the rows of one matmul: [G, T * H / G, K].
    q = inputs.q.reshape(tokens, groups, shared, head_dim).swapaxes(0, 1)
    q = q.reshape(groups, tokens * shared, head_dim)
    block = pl.BlockSpec(
        (groups, rows, head_dim), lambda s, group, tile, *_: (0, tile[s], 0)
    )
    varying = jax.typeof(q).manual_axis_type
    chunk = (2, blocks.pages, *inputs.pages.shape[1:])
    run = pl.pallas_call(
        functools.partial(_body, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(steps.group.shape[0],),
            in_specs=[block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM(chunk, inputs.pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, head_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype, manual_axis_type=varying),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=_cost(inputs),
        name="paged_attention",
    )
    scalars = (inputs.lengths, inputs.table.reshape(-1), inputs.scales.reshape(-1))
    out = run(*jax.tree.leaves(steps), *scalars, q, inputs.pages)
    out = out.reshape(groups, tokens, shared, head_dim).swapaxes(0, 1)
    return out.reshape(tokens, heads, head_dim)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What the body is told.

    Attributes:
        options: of the call.
        blocks: sizes.
        shared: query heads of a key head.
        table: sequences, and pages of each at most.
    """

    options: Options
    blocks: Blocks
    shared: int
    table: tuple[int, ...]

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.table[0]


def _body(kernel: _Kernel, *refs: Ref) -> None:
    scalars, (q, pages, out, *scratch) = Scalars(*refs[:8]), refs[8:]
    buffers, semaphores, turn, highest, total, summed = scratch
    copies = tpu_pages.Copies(
        scalars, kernel.blocks, kernel.table, pages, buffers, semaphores
    )
    # Here and not inside of loops and branches, which interpreters do not know.
    s = pl.program_id(0)
    following = jnp.minimum(s + 1, pl.num_programs(0) - 1)
    sequence, tile, after = scalars.group[s], scalars.tile[s], scalars.group[following]
    active = s < scalars.count[0]
    real = active & (sequence < kernel.sequences)

    @pl.when((s == 0) & real)
    def _() -> None:
        turn[0] = 0
        copies.start(sequence, _chunks(kernel, scalars, s)[0], 0)

    @pl.when(real)
    def _() -> None:
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)
        span = _span(kernel, scalars, sequence)
        begin, end = span.chunks(tile)

        def start_next(chunk: Any, more: Any, slot: Any) -> None:
            """The pages after these: of this step, or the first of the next one."""
            pl.when(more)(lambda: copies.start(sequence, chunk, slot))

            @pl.when(~more & (s + 1 < scalars.count[0]) & (after < kernel.sequences))
            def _() -> None:
                copies.start(after, _chunks(kernel, scalars, following)[0], slot)

        def visit(chunk: Any, _: None) -> None:
            slot = turn[0]
            start_next(chunk + 1, chunk + 1 < end, 1 - slot)
            copies.wait(slot)
            turn[0] = 1 - slot
            places = _places(kernel, span, tile, chunk)
            for group in range(q.shape[0]):
                _add_chunk(
                    kernel,
                    q.at[group],
                    buffers.at[slot, :, group],
                    places,
                    (highest.at[group], total.at[group], summed.at[group]),
                    scalars.scales[2 * group],
                )

        lax.fori_loop(begin, end, visit, None)

    @pl.when(active)
    def _() -> None:
        _store(kernel, scalars, s, out, total, summed)


def _add_chunk(
    kernel: _Kernel,
    q: Ref,
    pages: Ref,
    places: tuple[Array, Array],
    state: tuple[Ref, Ref, Ref],
    key_scale: Array,
) -> None:
    """Online softmax of one key head: `pages` is [pages, 2, page, K]."""
    seen, written = places
    highest, total, summed = state
    keys, values = (
        pages[:, i].reshape(kernel.blocks.keys, -1).astype(q.dtype) for i in range(2)
    )
    # Beyond the end of a sequence a page may hold anything, infinities too.
    values = jnp.where(written, values.astype(jnp.float32), 0.0).astype(q.dtype)
    scores = _dot(q[...], keys, _OUTER) * (kernel.options.scale * key_scale)
    scores = jnp.where(seen, scores, MASKED)
    before = highest[...]
    now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - now[:, :1])
    shrink = jnp.exp(before - now)
    highest[...] = now
    total[...] = total[...] * shrink + weights.sum(axis=1, keepdims=True)
    added = _dot(weights.astype(q.dtype), values, _INNER)
    summed[...] = summed[...] * shrink[:, :1] + added


def _places(kernel: _Kernel, span: Span, tile: Any, chunk: Any) -> tuple[Array, Array]:
    """Which scores of a block count, and which of its keys [keys, 1] there are."""
    blocks, shared = kernel.blocks, kernel.shared
    shape = (blocks.queries * shared, blocks.keys)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    if shared > 1:
        row = lax.div(row, jnp.full_like(row, shared))
    position = span.position(tile * blocks.queries + row)
    first = chunk * blocks.keys
    key = first + lax.broadcasted_iota(jnp.int32, shape, 1)
    column = first + lax.broadcasted_iota(jnp.int32, (blocks.keys, 1), 0)
    return span.sees(position, key), column < span.length


def _store(
    kernel: _Kernel, scalars: Scalars, s: Any, out: Ref, total: Ref, summed: Ref
) -> None:
    """The rows of step s's sequence, or zeros in those of none."""
    sequence = scalars.group[s]
    real = sequence < kernel.sequences
    first = scalars.tile[s] * kernel.blocks.queries
    begin = (scalars.start[sequence] - first) * kernel.shared
    stop = (scalars.end[sequence] - first) * kernel.shared
    row = lax.broadcasted_iota(jnp.int32, out.shape[1:], 0)
    mine = (row >= begin) & (row < stop)
    for group in range(out.shape[0]):
        sums = total[group][:, :1]
        share = scalars.scales[2 * group + 1] / jnp.where(sums == 0, 1.0, sums)
        result = jnp.where(real, summed[group] * share, 0.0)
        kept = jnp.where(mine, result, out[group].astype(jnp.float32))
        out[group] = kept.astype(out.dtype)


def _span(kernel: _Kernel, scalars: Scalars, sequence: Any) -> Span:
    return Span(
        kernel.blocks,
        kernel.options.window,
        scalars.start[sequence],
        scalars.end[sequence],
        scalars.lengths[jnp.minimum(sequence, kernel.sequences - 1)],
    )


def _chunks(kernel: _Kernel, scalars: Scalars, step: Any) -> tuple[Any, Any]:
    span = _span(kernel, scalars, scalars.group[step])
    return span.chunks(scalars.tile[step])


def _dot(x: Array, y: Array, dims: Any) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _cost(inputs: Inputs) -> pl.CostEstimate:
    """With every sequence as long as its pages allow: what is not known until later."""
    tokens, heads, head_dim = inputs.q.shape
    sequences, slots = inputs.table.shape
    keys = slots * inputs.page
    token_bytes = 2 * inputs.groups * head_dim * inputs.pages.dtype.itemsize
    vectors = 2 * inputs.q.size * inputs.q.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * tokens * heads * head_dim * keys,
        transcendentals=tokens * heads * keys,
        bytes_accessed=vectors + sequences * keys * token_bytes,
    )
