"""What the three kernels of flash attention on GPU share.

A program has the tiles of two warpgroups, 64 rows each. A third warpgroup copies blocks
of the other side into a ring of buffers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import Sight, Spans
from kernels_pallas.flash_attention.gpu_scores import Scores
from kernels_pallas.gpu_ring import COMPUTING, Arrays, Refs, Ring, load, shared

ROWS = 64
"""Rows of a warpgroup: what one wgmma has."""

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call.

    Attributes:
        scores: what becomes of products.
        padded: tokens, a multiple of 128.
        head_dim: K.
        repeats: query heads per key head.
        dtype: of the inputs of matmuls.
        segments: whether there are any.
        block: tokens of a block in the ring; divides 128.
        stages: buffers in the ring.
    """

    scores: Scores
    padded: int
    head_dim: int
    repeats: int
    dtype: Any
    segments: bool
    block: int
    stages: int

    def scratch(self, own: Arrays, ring: Mapping[str, Arrays]) -> Refs:
        """Shared memory and barriers of a program, by name.

        Args:
            own: arrays of each of the two warpgroups.
            ring: arrays of each buffer, in groups that are waited for together.
        """
        memory = {name: shared(COMPUTING, *array) for name, array in own.items()}
        memory["own_filled"] = plgpu.Barrier(
            num_arrivals=len(own), num_barriers=COMPUTING
        )
        return memory | self.ring.scratch(ring)

    def window(self, inputs: Refs) -> Any:
        """The window, known or read; None if there is none."""
        known = self.scores.options.window
        return inputs["window"][0] if known is None and "window" in inputs else known

    def sight(self, inputs: Refs) -> Sight:
        """What queries see of keys."""
        causal, length = self.scores.options.causal, self.scores.length
        window = self.window(inputs)
        return Sight(length, self.padded, causal, window, self.segments)

    def tokens(self, block: Any) -> Any:
        """Those of a block of the ring."""
        return pl.ds(block * self.block, self.block)

    def cuts(self, inputs: Refs) -> bool:
        """Whether the first of the blocks may need a mask."""
        return self.segments or self.window(inputs) is not None

    @property
    def ring(self) -> Ring:
        """The buffers that blocks are copied into."""
        return Ring(self.stages)


def load_own(memory: Refs, sources: Refs, warpgroup: Any) -> None:
    """Copies a warpgroup's own arrays, and waits for them."""
    for name, source in sources.items():
        load(memory, source, name, "own", warpgroup)
    plgpu.barrier_wait(memory["own_filled"].at[warpgroup])


def visit(spans: Spans, body: Callable[..., Any], state: Any, cuts: bool) -> Any:
    """`state` after `body(cut, block, state)` for each block of `spans`.

    Args:
        spans: which blocks.
        body: is told whether the block is one that needs a mask.
        state: at the beginning.
        cuts: False leaves the first loop out of the program.
    """

    def step(cut: bool) -> Callable[[Any, Any], Any]:
        return lambda block, state: body(cut, block, state)

    low = spans.low if cuts else spans.first
    if cuts:
        state = lax.fori_loop(spans.first, low, step(True), state)
    state = lax.fori_loop(low, spans.high, step(False), state)
    return lax.fori_loop(spans.high, spans.end, step(True), state)
