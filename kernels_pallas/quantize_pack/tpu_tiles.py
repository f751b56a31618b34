"""How the TPU kernels cut a matrix into the blocks of grid steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.quantize_pack.format import BLOCK, Format

LANES = 128
COLUMNS = 512
BLOCKS = 4
"""Of a step: half a MB of bfloat16, so that transfers outweigh the step itself."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a matrix is cut.

    Attributes:
        kind: its format when packed.
        group: rows of a scale.
        rows, columns: of the matrix.
    """

    kind: Format
    group: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of 256 rows."""
        return -(-self.rows // BLOCK)

    @property
    def step_blocks(self) -> int:
        """Blocks of a step."""
        return min(BLOCKS, self.blocks)

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return self.step_blocks * BLOCK

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return min(COLUMNS, self.columns)

    @property
    def grid(self) -> tuple[int, int]:
        """Steps along rows and columns."""
        return -(-self.blocks // self.step_blocks), -(-self.columns // COLUMNS)

    @property
    def parts(self) -> list[slice]:
        """The columns of a step, up to 128 at a time."""
        starts = range(0, self.step_columns, LANES)
        return [slice(i, min(i + LANES, self.step_columns)) for i in starts]

    def matrix_spec(self) -> pl.BlockSpec:
        """Of the matrix."""
        return pl.BlockSpec(
            (self.step_rows, self.step_columns), lambda i, j, *_: (i, j)
        )

    def packed_specs(self, parts: bool = False) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of the packed bytes and the scales; `parts`: of one of several."""
        lead = (None,) if parts else ()
        bytes_shape = (self.kind.planes, self.kind.slab_rows)
        shapes = (bytes_shape, (BLOCK // self.group,))

        def place(rank: int, i: Any, j: Any, *part: Any) -> tuple[Any, ...]:
            return (*part[: len(lead)], i, *(0,) * rank, j)

        packed, scales = (
            pl.BlockSpec(
                (*lead, self.step_blocks, *shape, self.step_columns),
                functools.partial(place, len(shape)),
            )
            for shape in shapes
        )
        return packed, scales

    def packed_structs(self, like: Array) -> list[jax.ShapeDtypeStruct]:
        """Of the packed bytes and the scales."""
        planes = (self.blocks, self.kind.planes, self.kind.slab_rows, self.columns)
        groups = (self.blocks, BLOCK // self.group, self.columns)
        return [
            struct(planes, jnp.uint8, like),
            struct(groups, jnp.float32, like),
        ]

    def cost(self, *, parts: int, plain_bytes: int) -> pl.CostEstimate:
        """About ten operations for a number."""
        numbers = self.blocks * BLOCK * self.columns
        bits = 8 * self.kind.planes / self.kind.slabs + 32 / self.group
        return pl.CostEstimate(
            flops=10 * numbers * parts,
            bytes_accessed=int(numbers * (parts * bits / 8 + plain_bytes)),
            transcendentals=0,
        )


def struct(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """Of a result that varies along mesh axes as `like` does."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
