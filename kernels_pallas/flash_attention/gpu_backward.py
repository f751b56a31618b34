"""The backward kernels of flash attention on GPU: query gradient; key and value.

Both recompute the scores, in tiles of 64 by 64 (Dao, 2023, "FlashAttention-2").
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels_pallas.flash_attention import gpu_forward, gpu_matmul
from kernels_pallas.flash_attention.gpu_blocks import Spans
from kernels_pallas.flash_attention.gpu_kernel import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Kernel,
    load_own,
    visit,
)
from kernels_pallas.flash_attention.gpu_scores import Tile
from kernels_pallas.gpu_ring import COMPUTING, Arrays, Refs, split


def query_scratch(kernel: Kernel) -> Refs:
    """Shared memory and barriers of the query gradient, by name."""
    tile = ((ROWS, kernel.head_dim), kernel.dtype)
    block = ((kernel.block, kernel.head_dim), kernel.dtype)
    number = ((ROWS,), jnp.float32)
    own: Arrays = {"q": tile, "d_out": tile, "lse": number, "delta": number}
    first: Arrays = {"k": block}
    if kernel.segments:
        own["rows"] = ((ROWS,), jnp.int32)
        first["columns"] = ((kernel.block,), jnp.int32)
    return kernel.scratch(own, {"k": first, "v": {"v": block}})


def query_body(kernel: Kernel, inputs: Refs, dq: Any, memory: Refs) -> None:
    """The gradient of 128 queries of a head.

    Args:
        kernel: the call.
        inputs: those of the forward kernel; d_out like q; lse in units of log2 and
            delta, [B, H, S].
        dq: like q.
        memory: as `query_scratch` says.
    """
    program = gpu_forward.Program.here(kernel, inputs, memory)
    split(lambda warpgroup: _query_gradient(program, warpgroup, dq), program.copy)


def _query_gradient(program: gpu_forward.Program, warpgroup: Any, dq: Any) -> None:
    kernel, inputs, memory = program.kernel, program.inputs, program.memory
    row = program.row + warpgroup * ROWS
    tokens = pl.ds(row, ROWS)
    own = {
        name: inputs[name].at[program.batch, tokens, program.head]
        for name in ("q", "d_out")
    }
    for name in ("lse", "delta"):
        own[name] = inputs[name].at[program.batch, program.head, tokens]
    if kernel.segments:
        own["rows"] = inputs["segments"].at[program.batch, tokens]
    load_own(memory, own, warpgroup)
    rows = program.row_segments(warpgroup)
    q, d_out = memory["q"].at[warpgroup], memory["d_out"].at[warpgroup]
    lse, delta = (
        lax.broadcast_in_dim(
            plgpu.layout_cast(memory[name].at[warpgroup][...], PER_ROW),
            (ROWS, kernel.block),
            [0],
        )
        for name in ("lse", "delta")
    )

    def block(cut: bool, block: Any, total: Array) -> Array:
        slot = program.slot(block)
        k, v = memory["k"].at[slot], memory["v"].at[slot]
        plgpu.barrier_wait(memory["k_filled"].at[slot])
        raw = gpu_matmul.multiply(q, k)
        plgpu.barrier_wait(memory["v_filled"].at[slot])
        d_weights = gpu_matmul.multiply(d_out, v)
        plgpu.barrier_arrive(memory["v_free"].at[slot])
        tile = program.tile(row, rows, block, cut)
        weights = _weights(kernel, raw, tile, cut, lse)
        d_raw = weights * kernel.scores.slope(raw) * (d_weights - delta)
        total = gpu_matmul.accumulate(total, d_raw.astype(kernel.dtype), k)
        plgpu.barrier_arrive(memory["k_free"].at[slot])
        return total

    total = visit(program.spans, block, _zeros(kernel), kernel.cuts(inputs))
    q[...] = total.astype(kernel.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, dq.at[program.batch, tokens, program.head])
    plgpu.wait_smem_to_gmem(0)


def key_scratch(kernel: Kernel) -> Refs:
    """Shared memory and barriers of the key and value gradient, by name."""
    tile = ((ROWS, kernel.head_dim), kernel.dtype)
    block = ((kernel.block, kernel.head_dim), kernel.dtype)
    number = ((kernel.block,), jnp.float32)
    own: Arrays = {"k": tile, "v": tile}
    first: Arrays = {"q": block, "lse": number}
    if kernel.segments:
        own["rows"] = ((ROWS,), jnp.int32)
        first["columns"] = ((kernel.block,), jnp.int32)
    second = {"d_out": block, "delta": number}
    return kernel.scratch(own, {"q": first, "d_out": second})


def key_body(kernel: Kernel, inputs: Refs, dk: Any, dv: Any, memory: Refs) -> None:
    """The gradients of 128 keys and values of a key head.

    Args:
        kernel: the call.
        inputs: as for `query_body`.
        dk, dv: like k.
        memory: as `key_scratch` says.
    """
    program = _KeyProgram.here(kernel, inputs, memory)
    split(lambda warpgroup: program.compute(warpgroup, dk, dv), program.copy)


@dataclasses.dataclass(frozen=True)
class _KeyProgram:
    """One program of the grid: 128 keys of a key head, from `row` on.

    A step is a block of queries of one of the heads that read these keys.
    """

    kernel: Kernel
    inputs: Refs
    memory: Refs
    batch: Any
    group: Any
    row: Any
    spans: Spans

    @classmethod
    def here(cls, kernel: Kernel, inputs: Refs, memory: Refs) -> "_KeyProgram":
        rows = COMPUTING * ROWS
        row = lax.axis_index("tile") * rows
        spans = kernel.sight(inputs).queries_of(row, rows, kernel.block)
        batch, group = lax.axis_index("batch"), lax.axis_index("head")
        return cls(kernel, inputs, memory, batch, group, row, spans)

    def _step(self, repeat: Any, block: Any) -> Any:
        return repeat * self._blocks() + (block - self.spans.first)

    def _blocks(self) -> Any:
        return self.spans.end - self.spans.first

    def _head(self, repeat: Any) -> Any:
        return self.group * self.kernel.repeats + repeat

    def copy(self) -> None:
        """Copies the blocks of queries, of every head in turn."""
        steps = (jnp.int32(0), self._blocks() * self.kernel.repeats)
        self.kernel.ring.fill(self.memory, steps, self._sources)

    def _sources(self, step: Any) -> dict[str, Refs]:
        head = self._head(lax.div(step, self._blocks()))
        block = self.spans.first + lax.rem(step, self._blocks())
        tokens = self.kernel.tokens(block)
        q, d_out = (
            self.inputs[name].at[self.batch, tokens, head] for name in ("q", "d_out")
        )
        lse, delta = (
            self.inputs[name].at[self.batch, head, tokens] for name in ("lse", "delta")
        )
        first = {"q": q, "lse": lse}
        if self.kernel.segments:
            first["columns"] = self.inputs["segments"].at[self.batch, tokens]
        return {"q": first, "d_out": {"d_out": d_out, "delta": delta}}

    def compute(self, warpgroup: Any, dk: Any, dv: Any) -> None:
        """The gradients of one warpgroup's keys and values."""
        row = self.row + warpgroup * ROWS
        tokens = pl.ds(row, ROWS)
        own = {x: self.inputs[x].at[self.batch, tokens, self.group] for x in "kv"}
        if self.kernel.segments:
            own["rows"] = self.inputs["segments"].at[self.batch, tokens]
        load_own(self.memory, own, warpgroup)

        def head(repeat: Any, state: Any) -> Any:
            def block(cut: bool, block: Any, state: Any) -> Any:
                slot = self.kernel.ring.slot(self._step(repeat, block), jnp.int32(0))
                tile = self._tile(row, repeat, block)
                return self._add(warpgroup, slot, tile, cut, state)

            return visit(self.spans, block, state, self._cuts())

        state = (_zeros(self.kernel), _zeros(self.kernel))
        state = lax.fori_loop(0, self.kernel.repeats, head, state)
        for name, total, out in zip("kv", state, (dk, dv), strict=True):
            staged = self.memory[name].at[warpgroup]
            staged[...] = total.astype(self.kernel.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out.at[self.batch, tokens, self.group])
        plgpu.wait_smem_to_gmem(0)

    def _cuts(self) -> bool:
        """Whether the first blocks may need a mask: under causality, they do."""
        return self.kernel.scores.options.causal or self.kernel.cuts(self.inputs)

    def _tile(self, row: Any, repeat: Any, block: Any) -> Tile:
        """Where scores are; the segments are known when the queries have arrived."""
        slopes = self.inputs.get("slopes")
        return Tile(
            ROWS,
            self.kernel.block,
            row,
            block * self.kernel.block,
            transposed=True,
            window=self.kernel.window(self.inputs),
            slope=None if slopes is None else slopes[self._head(repeat)],
            segments=None,
        )

    def _add(
        self, warpgroup: Any, slot: Any, tile: Tile, cut: bool, state: Any
    ) -> tuple[Array, Array]:
        """Adds what a block of queries gives to the gradients."""
        kernel, memory = self.kernel, self.memory
        k, v = (memory[name].at[warpgroup] for name in "kv")
        q, d_out = memory["q"].at[slot], memory["d_out"].at[slot]
        dk, dv = state
        plgpu.barrier_wait(memory["q_filled"].at[slot])
        raw = gpu_matmul.multiply(k, q)
        if cut and kernel.segments:
            rows = plgpu.layout_cast(memory["rows"].at[warpgroup][...], PER_ROW)
            columns = plgpu.layout_cast(memory["columns"].at[slot][...], PER_COLUMN)
            tile = dataclasses.replace(tile, segments=(rows, columns))
        weights = _weights(kernel, raw, tile, cut, self._per_query("lse", slot))
        # Here, not below: after it, nothing needs the raw scores' registers.
        slope = weights * kernel.scores.slope(raw)
        plgpu.barrier_wait(memory["d_out_filled"].at[slot])
        # This order holds the fewest registers: dk and dv have 128 of them already.
        dv = gpu_matmul.accumulate(dv, weights.astype(kernel.dtype), d_out)
        d_weights = gpu_matmul.multiply(v, d_out)
        delta = self._per_query("delta", slot)
        plgpu.barrier_arrive(memory["d_out_free"].at[slot])
        d_raw = slope * (d_weights - delta)
        dk = gpu_matmul.accumulate(dk, d_raw.astype(kernel.dtype), q)
        plgpu.barrier_arrive(memory["q_free"].at[slot])
        return dk, dv

    def _per_query(self, name: str, slot: Any) -> Array:
        """A number per query of a block, float32 [64, block]."""
        numbers = plgpu.layout_cast(self.memory[name].at[slot][...], PER_COLUMN)
        return lax.broadcast_in_dim(numbers, (ROWS, self.kernel.block), [1])


def _weights(kernel: Kernel, raw: Array, tile: Tile, cut: bool, lse: Array) -> Array:
    """The softmax of the forward pass, from raw scores and the normaliser's log2."""
    scores = kernel.scores.place(raw, tile, cut)
    return jnp.exp2(scores * kernel.scores.unit - lse)


def _zeros(kernel: Kernel) -> Array:
    zeros = jnp.zeros((ROWS, kernel.head_dim), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
