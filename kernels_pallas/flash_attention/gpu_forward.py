"""The forward kernel of flash attention on GPU: 128 queries of a head a program."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels_pallas.flash_attention import gpu_matmul
from kernels_pallas.flash_attention.gpu_blocks import Spans
from kernels_pallas.flash_attention.gpu_kernel import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Kernel,
    load_own,
    visit,
)
from kernels_pallas.flash_attention.gpu_scores import LOG2_E, Tile
from kernels_pallas.flash_attention.reference import MASKED
from kernels_pallas.gpu_ring import COMPUTING, Arrays, Refs, split

State = tuple[Array, Array, Array]
"""Weighted sum of values [64, K], highest score [64] and sum of weights [64]."""


def scratch(kernel: Kernel) -> Refs:
    """Shared memory and barriers, by name."""
    tile = ((ROWS, kernel.head_dim), kernel.dtype)
    block = ((kernel.block, kernel.head_dim), kernel.dtype)
    own: Arrays = {"q": tile}
    first: Arrays = {"k": block}
    if kernel.segments:
        own["rows"] = ((ROWS,), jnp.int32)
        first["columns"] = ((kernel.block,), jnp.int32)
    memory = kernel.scratch(own, {"k": first, "v": {"v": block}})
    return memory | {"lse": plgpu.SMEM((COMPUTING, ROWS), jnp.float32)}


def body(kernel: Kernel, inputs: Refs, out: Any, lse: Any, memory: Refs) -> None:
    """What a program does.

    Args:
        kernel: the call.
        inputs: q [B, S, H, K], k and v [B, S, G, K]; and, if there are any, segments
            [B, S], window [1], slopes and sinks [H].
        out: like q.
        lse: [B, H, S].
        memory: as `scratch` says.
    """
    program = Program.here(kernel, inputs, memory)
    split(lambda warpgroup: program.compute(warpgroup, out, lse), program.copy)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the grid: 128 queries of a head, from `row` on."""

    kernel: Kernel
    inputs: Refs
    memory: Refs
    batch: Any
    head: Any
    row: Any
    spans: Spans

    @classmethod
    def here(cls, kernel: Kernel, inputs: Refs, memory: Refs) -> "Program":
        """The one that is running."""
        rows = COMPUTING * ROWS
        # The last queries see most: begun first, they do not end last.
        row = (kernel.padded // rows - 1 - lax.axis_index("tile")) * rows
        spans = kernel.sight(inputs).keys_of(row, rows, kernel.block)
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        return cls(kernel, inputs, memory, batch, head, row, spans)

    def copy(self) -> None:
        """Copies the blocks of keys and values."""
        steps = (self.spans.first, self.spans.end)
        self.kernel.ring.fill(self.memory, steps, self._sources)

    def _sources(self, block: Any) -> dict[str, Refs]:
        tokens = self.kernel.tokens(block)
        group = lax.div(self.head, jnp.int32(self.kernel.repeats))
        k, v = (self.inputs[name].at[self.batch, tokens, group] for name in "kv")
        first = {"k": k}
        if self.kernel.segments:
            first["columns"] = self.inputs["segments"].at[self.batch, tokens]
        return {"k": first, "v": {"v": v}}

    def compute(self, warpgroup: Any, out: Any, lse: Any) -> None:
        """The output and the lse of one warpgroup's queries."""
        row = self.row + warpgroup * ROWS
        tokens = pl.ds(row, ROWS)
        own = {"q": self.inputs["q"].at[self.batch, tokens, self.head]}
        if self.kernel.segments:
            own["rows"] = self.inputs["segments"].at[self.batch, tokens]
        load_own(self.memory, own, warpgroup)
        rows = self.row_segments(warpgroup)

        def block(cut: bool, block: Any, state: State) -> State:
            q, slot = self.memory["q"].at[warpgroup], self.slot(block)
            plgpu.barrier_wait(self.memory["k_filled"].at[slot])
            raw = gpu_matmul.multiply(q, self.memory["k"].at[slot])
            tile = self.tile(row, rows, block, cut)
            plgpu.barrier_arrive(self.memory["k_free"].at[slot])
            return self._add(raw, tile, cut, slot, state)

        cuts = self.kernel.cuts(self.inputs)
        state = visit(self.spans, block, self._begin(), cuts)
        self._end(warpgroup, tokens, state, out, lse)

    def slot(self, block: Any) -> Any:
        """The buffer of a block."""
        return self.kernel.ring.slot(block, self.spans.first)

    def row_segments(self, warpgroup: Any) -> Array | None:
        """Those of a warpgroup's queries."""
        if not self.kernel.segments:
            return None
        return plgpu.layout_cast(self.memory["rows"].at[warpgroup][...], PER_ROW)

    def tile(self, row: Any, rows: Array | None, block: Any, cut: bool) -> Tile:
        """Where the scores of a block are; its keys have to be in shared memory."""
        segments = None
        if cut and rows is not None:
            columns = self.memory["columns"].at[self.slot(block)]
            segments = (rows, plgpu.layout_cast(columns[...], PER_COLUMN))
        slopes = self.inputs.get("slopes")
        return Tile(
            ROWS,
            self.kernel.block,
            row,
            block * self.kernel.block,
            transposed=False,
            window=self.kernel.window(self.inputs),
            slope=None if slopes is None else slopes[self.head],
            segments=segments,
        )

    def _begin(self) -> State:
        """Nothing seen yet; a sink is like a key that was, without a value."""
        highest, total = jnp.full((ROWS,), MASKED, jnp.float32), 0.0
        if "sinks" in self.inputs:
            sink = self.inputs["sinks"][self.head] * LOG2_E
            highest, total = lax.broadcast(sink, (ROWS,)), 1.0
        summed = jnp.zeros((ROWS, self.kernel.head_dim), jnp.float32)
        return (
            plgpu.layout_cast(summed, plgpu.Layout.WGMMA),
            plgpu.layout_cast(highest, PER_ROW),
            plgpu.layout_cast(jnp.full((ROWS,), total, jnp.float32), PER_ROW),
        )

    def _add(self, raw: Array, tile: Tile, cut: bool, slot: Any, state: State) -> State:
        """Adds the values of a block, whose raw scores are given."""
        summed, before, total = state
        scores = self.kernel.scores.place(raw, tile, cut)
        unit = self.kernel.scores.unit
        highest = jnp.maximum(before, scores.max(axis=1) * unit)
        shrink = jnp.exp2(before - highest)
        weights = scores * unit - lax.broadcast_in_dim(highest, raw.shape, [0])
        weights = jnp.exp2(weights)
        total = total * shrink + weights.sum(axis=1)
        summed = summed * lax.broadcast_in_dim(shrink, summed.shape, [0])
        weights = weights.astype(self.kernel.dtype)
        plgpu.barrier_wait(self.memory["v_filled"].at[slot])
        summed = gpu_matmul.accumulate(summed, weights, self.memory["v"].at[slot])
        plgpu.barrier_arrive(self.memory["v_free"].at[slot])
        return summed, highest, total

    def _end(
        self, warpgroup: Any, tokens: Any, state: State, out: Any, lse: Any
    ) -> None:
        """Divides by the sum of weights, and writes."""
        summed, highest, total = state
        summed = summed / lax.broadcast_in_dim(total, summed.shape, [0])
        # Of the queries nothing more is needed: the output takes their place.
        q, staged = self.memory["q"].at[warpgroup], self.memory["lse"].at[warpgroup]
        q[...] = summed.astype(self.kernel.dtype)
        staged[...] = highest * math.log(2) + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out.at[self.batch, tokens, self.head])
        plgpu.copy_smem_to_gmem(staged, lse.at[self.batch, self.head, tokens])
        plgpu.wait_smem_to_gmem(0)
