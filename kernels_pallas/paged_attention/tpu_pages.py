"""Pages on TPU: copied in by the page table, and written with new tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.arrays import pad_dim, vary_like
from kernels_pallas.paged_attention.inputs import Inputs, quantized
from kernels_pallas.paged_attention.plan import Blocks

Ref = Any


@dataclasses.dataclass(frozen=True)
class Scalars:
    """What the kernel has in scalar memory.

    Attributes:
        group, tile, start, end, count: see `schedule.Steps`, a group is a sequence.
        lengths: keys of each sequence.
        table: pages of the sequences, one after the other.
        scales: of keys and values of each key head, in turn.
    """

    group: Ref
    tile: Ref
    start: Ref
    end: Ref
    count: Ref
    lengths: Ref
    table: Ref
    scales: Ref


@dataclasses.dataclass(frozen=True)
class Copies:
    """Asynchronous copies of pages into one of two buffers.

    Attributes:
        scalars, blocks: see there.
        table: sequences, and pages of each at most.
        pages: the pool, in HBM.
        buffers: [2, pages, G, 2, page, K].
        semaphores: one for each buffer.
    """

    scalars: Scalars
    blocks: Blocks
    table: tuple[int, ...]
    pages: Ref
    buffers: Ref
    semaphores: Ref

    def start(self, sequence: Any, chunk: Any, slot: Any) -> None:
        """Copies a block of pages; for those after a sequence's last it is the last."""
        length = self.scalars.lengths[sequence]
        last = lax.div(jnp.maximum(length - 1, 0), jnp.int32(self.blocks.page))
        last = jnp.minimum(last, self.table[1] - 1)
        for i in range(self.blocks.pages):
            place = jnp.minimum(chunk * self.blocks.pages + i, last)
            page = self.scalars.table[sequence * self.table[1] + place]
            self._copy(page, i, slot).start()

    def wait(self, slot: Any) -> None:
        """Until a block is there."""
        for i in range(self.blocks.pages):
            self._copy(0, i, slot).wait()

    def _copy(self, page: Any, i: int, slot: Any) -> Any:
        return pltpu.make_async_copy(
            self.pages.at[page], self.buffers.at[slot, i], self.semaphores.at[slot]
        )


def write(inputs: Inputs, new: Float[Array, "T G 2 K"]) -> Array:
    """The pages with the new tokens' keys and values, in the memory of the old ones.

    A grid step has a page that new tokens belong to. It reads the page, and the two
    blocks of as many new tokens that its rows come from.
    """
    tokens, groups, _, head_dim = new.shape
    page, pool = inputs.page, inputs.pages
    visits = _Visits.of(inputs, tokens)
    # A page in front, so that the first token may be anywhere in its page.
    padded = pad_dim(new.transpose(1, 2, 0, 3), 2, (-(-tokens // page) + 1) * page)
    padded = jnp.pad(padded, ((0, 0), (0, 0), (page, 0), (0, 0)))

    def part(i: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (groups, 2, page, head_dim),
            lambda s, pages, first, *_: (
                0,
                0,
                lax.div(first[s], jnp.int32(page)) + i,
                0,
            ),
        )

    block = pl.BlockSpec(
        (None, groups, 2, page, head_dim), lambda s, pages, *_: (pages[s], 0, 0, 0, 0)
    )
    varying = jax.typeof(pool).manual_axis_type
    run = pl.pallas_call(
        functools.partial(_write_body, page),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(visits.page.shape[0],),
            in_specs=[part(0), part(1), block],
            out_specs=block,
        ),
        out_shape=jax.ShapeDtypeStruct(
            pool.shape, pool.dtype, manual_axis_type=varying
        ),
        input_output_aliases={7: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=visits.page.shape[0]
            * 2
            * (pool[0].size * pool.dtype.itemsize + 2 * new.itemsize * pool[0].size),
        ),
        name="paged_attention_write",
    )
    scalars = (*jax.tree.leaves(visits), inputs.scales.reshape(-1))
    return run(*scalars, padded, padded, pool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Visits:
    """Pages that are written, int32; those after the last repeat it.

    Attributes:
        page: which one.
        first: the token in the page's first row, counted with the page in front.
        begin, stop: rows of the page that are new.
    """

    page: Array
    first: Array
    begin: Array
    stop: Array

    @classmethod
    def of(cls, inputs: Inputs, tokens: int) -> "_Visits":
        """The visits of all sequences, with none if nothing is new: nothing changes."""
        sequences, slots = inputs.table.shape
        page, counts = inputs.page, inputs.counts
        before = inputs.lengths - counts
        first_slot = jnp.maximum(before, 0) // page
        last_slot = (inputs.lengths - 1) // page
        some = (counts > 0) & (inputs.lengths > 0)
        visits = jnp.where(some, last_slot - first_slot + 1, 0)
        total = jnp.cumsum(visits, dtype=jnp.int32)
        bound = min(tokens // page + 2 * sequences, tokens)
        step = jnp.arange(bound, dtype=jnp.int32)
        step = jnp.clip(step, 0, jnp.maximum(total[-1] - 1, 0))
        sequence = jnp.searchsorted(total, step, side="right").astype(jnp.int32)
        sequence = jnp.minimum(sequence, sequences - 1)
        slot = first_slot[sequence] + step - (total - visits)[sequence]
        # Position of the page's first row, as a token of this call.
        place = slot * page
        first = inputs.starts[sequence] + place - before[sequence] + page
        begin = jnp.maximum(before[sequence] - place, 0)
        stop = jnp.where(some[sequence], inputs.lengths[sequence] - place, 0)
        found = inputs.table[sequence, jnp.clip(slot, 0, slots - 1)]
        first = jnp.clip(first, 0, (-(-tokens // page) + 1) * page - 1)
        stop = jnp.where(slot < slots, stop, 0)
        made = cls(found, first, begin, stop)
        return jax.tree.map(lambda x: vary_like(x, inputs.pages), made)


def _write_body(page: int, *refs: Ref) -> None:
    _, first, begin, stop, scales, low, high, old, out = refs
    s = pl.program_id(0)
    shift = lax.rem(2 * page - lax.rem(first[s], jnp.int32(page)), 2 * page)
    row = lax.broadcasted_iota(jnp.int32, low.shape[2:], 0)
    new = (row >= begin[s]) & (row < stop[s])
    for group in range(low.shape[0]):
        for kind in range(2):
            parts = (low[group, kind], high[group, kind])
            both = jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=0)
            moved = pltpu.roll(both, shift, axis=0)[:page]
            numbers = quantized(moved / scales[2 * group + kind], out.dtype)
            kept = jnp.where(new, numbers, old[group, kind].astype(jnp.float32))
            out[group, kind] = kept.astype(out.dtype)
