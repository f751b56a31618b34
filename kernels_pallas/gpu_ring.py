"""A ring of buffers in a GPU's shared memory: one warpgroup copies, two compute.

Each of the two uses a buffer up on its own, and gives it back (Shah et al., 2024,
"FlashAttention-3", without the turns that the two warpgroups take there).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTING = 2
"""Warpgroups that compute; one more copies."""

Arrays = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype by name."""

Refs = dict[str, Any]
"""References by name: arrays in global memory, shared memory, or barriers."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that are filled and used up in turn.

    Attributes:
        stages: how many.
    """

    stages: int

    def scratch(self, groups: Mapping[str, Arrays]) -> Refs:
        """Shared memory and barriers, by name.

        Args:
            groups: arrays of each buffer, in groups that are waited for together.
        """
        memory = {}
        for group, arrays in groups.items():
            for name, array in arrays.items():
                memory[name] = shared(self.stages, *array)
            memory[f"{group}_filled"] = plgpu.Barrier(
                num_arrivals=len(arrays), num_barriers=self.stages
            )
            memory[f"{group}_free"] = plgpu.Barrier(
                num_arrivals=COMPUTING, num_barriers=self.stages
            )
        return memory

    def fill(
        self,
        memory: Refs,
        steps: tuple[Any, Any],
        sources: Callable[[Any], Mapping[str, Refs]],
    ) -> None:
        """Fills the ring, step after step, as its buffers are given back.

        Args:
            memory: with that of `scratch`.
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


def shared(count: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of so many buffers; what wgmma reads is swizzled for it.

    These are matrices of numbers of 8 or 16 bits, in tiles of 8 rows of 64 numbers.
    """
    size = jnp.dtype(dtype).itemsize
    transforms = ()
    if len(shape) == 2 and size <= 2:
        tiling = plgpu.TilingTransform((8, 64))
        transforms = (tiling, plgpu.SwizzleTransform(64 * size))
    return plgpu.SMEM((count, *shape), dtype, transforms=transforms)
