"""The body of the GPU kernel: packed weights, transposed, times tokens.

Weights are the left operand of wgmma, which takes it from registers: a thread reads the
words of a tile of 64 x 64 weights, and a few operations make them operands. The result
is that of 64 columns of the weight, for all tokens of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels_pallas import gpu_fragments
from kernels_pallas.gpu_ring import COMPUTING, Arrays, Refs, Ring, split
from kernels_pallas.quant_matmul import gpu_products
from kernels_pallas.quant_matmul.gpu_plan import scale_rows
from kernels_pallas.quant_matmul.gpu_products import Part
from kernels_pallas.quant_matmul.gpu_words import TILE, WIDTH, Codes
from kernels_pallas.quant_matmul.layouts import BLOCK

PER_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call.

    Attributes:
        codes: of the weights.
        dtype: of the tokens: float16, int8 or float8_e4m3fn.
        tokens: of a program.
        tiles: of 64 columns, of each warpgroup.
        steps: blocks of 256 rows that a program adds up.
        stages: buffers in the ring.
        group: rows of a scale, or None if scales follow the kernel.
    """

    codes: Codes
    dtype: Any
    tokens: int
    tiles: int
    steps: int
    stages: int
    group: int | None

    @property
    def columns(self) -> int:
        """Of a program."""
        return COMPUTING * self.tiles * TILE

    @property
    def groups(self) -> int:
        """Rows of scales that a block of 256 rows has."""
        return scale_rows(self.group)

    @property
    def sums(self) -> Any:
        """The dtype that the tensor core adds up in."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def promotes(self) -> bool:
        """Whether sums of a block are added up outside of the tensor core.

        It keeps 14 bits of sums of 8-bit floats (DeepSeek-V3, 2024, section 3.3.2).
        """
        return self.group is not None or self.dtype == jnp.float8_e4m3fn

    def arrays(self) -> Arrays:
        """Those of a buffer of the ring."""
        found: Arrays = {
            "x": ((self.tokens, BLOCK), self.dtype),
            "words": ((COMPUTING * self.tiles, self.codes.rows, WIDTH), jnp.uint32),
        }
        if self.groups:
            found["scales"] = ((self.groups, self.columns), jnp.float32)
        return found

    def scratch(self) -> Refs:
        """Shared memory and barriers of a program, by name."""
        memory = Ring(self.stages).scratch({"step": self.arrays()})
        staged = (COMPUTING * self.tiles, TILE, self.tokens)
        return memory | {"out": plgpu.SMEM(staged, jnp.float32)}


def body(kernel: Kernel, inputs: Refs, out: Any, memory: Refs) -> None:
    """What a program does: some columns, some tokens, some of the rows of K.

    Args:
        kernel: the call.
        inputs: x [M, K], words [L, N/64, K/256, R, 256], layer [1], and if there are
            groups scales [L, G, N].
        out: float32 [splits, N/64, 64, M].
        memory: as `Kernel.scratch` says.
    """
    program = _Program(kernel, inputs, memory)
    split(lambda warpgroup: program.compute(warpgroup, out), program.copy)


@dataclasses.dataclass(frozen=True)
class _Program:
    kernel: Kernel
    inputs: Refs
    memory: Refs

    @property
    def steps(self) -> tuple[Any, Any]:
        """The first block of 256 rows, and that behind the last."""
        first = lax.axis_index("split") * self.kernel.steps
        return first, first + self.kernel.steps

    @property
    def tokens(self) -> Any:
        return pl.ds(lax.axis_index("tokens") * self.kernel.tokens, self.kernel.tokens)

    def copy(self) -> None:
        """Copies tokens, words and scales of the steps."""
        layer = self.inputs["layer"][0]
        Ring(self.kernel.stages).fill(
            self.memory, self.steps, functools.partial(self._sources, layer)
        )

    def _sources(self, layer: Any, step: Any) -> dict[str, Refs]:
        kernel, program = self.kernel, lax.axis_index("columns")
        tiles = COMPUTING * kernel.tiles
        found = {
            "x": self.inputs["x"].at[self.tokens, pl.ds(step * BLOCK, BLOCK)],
            "words": self.inputs["words"].at[
                layer, pl.ds(program * tiles, tiles), step
            ],
        }
        if kernel.group is not None:
            group = lax.div(step * BLOCK, jnp.int32(kernel.group))
            columns = pl.ds(program * kernel.columns, kernel.columns)
            groups = pl.ds(group, kernel.groups)
            found["scales"] = self.inputs["scales"].at[layer, groups, columns]
        return {"step": found}

    def compute(self, warpgroup: Any, out: Any) -> None:
        """The sums of one warpgroup's columns."""
        kernel = self.kernel
        first, end = self.steps

        def step(step: Any, totals: Any) -> Any:
            slot = Ring(kernel.stages).slot(step, first)
            plgpu.barrier_wait(self.memory["step_filled"].at[slot])
            totals = tuple(
                self._add(total, slot, warpgroup * kernel.tiles + tile)
                for tile, total in enumerate(totals)
            )
            plgpu.barrier_arrive(self.memory["step_free"].at[slot])
            return totals

        zeros = self._zeros(jnp.float32 if kernel.promotes else kernel.sums)
        totals = lax.fori_loop(first, end, step, (zeros,) * kernel.tiles)
        self._write(warpgroup, totals, out)

    def _zeros(self, dtype: Any) -> Array:
        zeros = jnp.zeros((TILE, self.kernel.tokens), dtype)
        return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def _add(self, total: Array, slot: Any, tile: Any) -> Array:
        """Adds the products of a block of 256 rows of a tile of columns."""
        kernel, parts = self.kernel, self._parts(slot, tile)
        if not kernel.promotes:
            return gpu_products.accumulate(total, parts)
        groups = max(kernel.groups, 1)
        count = len(parts) // groups
        for group in range(groups):
            mine = parts[group * count : (group + 1) * count]
            sums = gpu_products.accumulate(self._zeros(kernel.sums), mine)
            sums = sums.astype(jnp.float32)
            if kernel.groups:
                columns = pl.ds(tile * TILE, TILE)
                scales = self.memory["scales"].at[slot, group, columns][...]
                scales = plgpu.layout_cast(scales, PER_ROW)
                sums = sums * lax.broadcast_in_dim(scales, sums.shape, [0])
            total = total + sums
        return total

    def _parts(self, slot: Any, tile: Any) -> list[Part]:
        """Operands of the tiles along K, and what they are multiplied with."""
        kernel = self.kernel
        words, x = self.memory["words"], self.memory["x"].at[slot]

        def read(row: int, rows: int) -> Array:
            return gpu_products.read(words.at[slot, tile, pl.ds(row, rows)])

        return [
            (
                functools.partial(gpu_fragments.fragments, operand, kernel.dtype),
                x.at[:, pl.ds(TILE * i, TILE)].transpose((1, 0)),
            )
            for i, operand in enumerate(kernel.codes.operands(read, kernel.dtype))
        ]

    def _write(self, warpgroup: Any, totals: tuple[Array, ...], out: Any) -> None:
        kernel = self.kernel
        split, program = lax.axis_index("split"), lax.axis_index("columns")
        for tile, total in enumerate(totals):
            mine = warpgroup * kernel.tiles + tile
            staged = self.memory["out"].at[mine]
            staged[...] = total.astype(jnp.float32)
            plgpu.commit_smem()
            column = program * (COMPUTING * kernel.tiles) + mine
            plgpu.copy_smem_to_gmem(staged, out.at[split, column, :, self.tokens])
        plgpu.wait_smem_to_gmem(0)
