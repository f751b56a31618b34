"""What the three kernels of flash attention on GPU share.

A program has the tiles of two warpgroups, 64 rows each. A third warpgroup copies blocks
of the other side into a ring of buffers; the two use each block up on their own, and
give the buffer back (Shah et al., 2024, "FlashAttention-3", without the turns that the
two warpgroups take there).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.gpu_blocks import Sight, Spans
from kernels_pallas.flash_attention.gpu_matmul import LAYOUT
from kernels_pallas.flash_attention.gpu_scores import Scores

ROWS = 64
"""Rows of a warpgroup: what one wgmma has."""

COMPUTING = 2
"""Warpgroups that compute; one more copies."""

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)

Arrays = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype by name. What has two dims is laid out for wgmma."""

Refs = dict[str, Any]
"""References by name: arrays in global memory, or what `scratch` allocates."""


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
        memory = {name: _shared(COMPUTING, *array) for name, array in own.items()}
        memory["own_filled"] = plgpu.Barrier(
            num_arrivals=len(own), num_barriers=COMPUTING
        )
        for group, arrays in ring.items():
            for name, array in arrays.items():
                memory[name] = _shared(self.stages, *array)
            memory[f"{group}_filled"] = plgpu.Barrier(
                num_arrivals=len(arrays), num_barriers=self.stages
            )
            memory[f"{group}_free"] = plgpu.Barrier(
                num_arrivals=COMPUTING, num_barriers=self.stages
            )
        return memory

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

    def fill(
        self,
        memory: Refs,
        steps: tuple[Any, Any],
        sources: Callable[[Any], Mapping[str, Refs]],
    ) -> None:
        """Fills the ring, step after step, as its buffers are given back.

        Args:
            memory: that of `scratch`.
            steps: the first, and that behind the last.
            sources: of a step, what to copy, by name in its group.
        """
        first, end = steps

        def fill(step: Any, waits: bool) -> None:
            slot = self.slot(step, first)
            for group, arrays in sources(step).items():
                if waits:
                    plgpu.barrier_wait(memory[f"{group}_free"].at[slot])
                for name, source in arrays.items():
                    load(memory, source, name, group, slot)

        filled = jnp.minimum(first + self.stages, end)
        lax.fori_loop(first, filled, lambda step, _: fill(step, False), None)
        lax.fori_loop(filled, end, lambda step, _: fill(step, True), None)

    def slot(self, step: Any, first: Any) -> Any:
        """The buffer of a step."""
        return lax.rem(step - first, jnp.int32(self.stages))


def load(memory: Refs, source: Any, name: str, group: str, place: Any) -> None:
    """Begins to copy an array into its shared memory."""
    ready = memory[f"{group}_filled"].at[place]
    plgpu.copy_gmem_to_smem(source, memory[name].at[place], ready)


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


def split(compute: Callable[[Any], None], copy: Callable[[], None]) -> None:
    """Gives the warpgroups their work, and registers to those that compute."""
    warpgroup = lax.axis_index("warpgroup")

    # 2 * 128 * 240 + 128 * 24 registers of the 65536 that there are.
    @pl.when(warpgroup < COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTING)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        copy()


def _shared(count: int, shape: tuple[int, ...], dtype: Any) -> Any:
    transforms = LAYOUT if len(shape) == 2 else ()
    return plgpu.SMEM((count, *shape), dtype, transforms=transforms)
