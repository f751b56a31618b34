"""What becomes of a tile of scores on GPU: scaled, capped, penalised, masked.

Written once for both orientations: rows are queries in the forward kernel, keys in that
of the key gradient. Weights are powers of two of scores, whose unit is theirs.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels_pallas.flash_attention.inputs import Options
from kernels_pallas.flash_attention.reference import MASKED

LOG2_E = math.log2(math.e)

Index = Any
"""An int32 scalar, perhaps traced."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile of scores lies, and what it needs of its tokens.

    Attributes:
        rows, columns: its size.
        row, column: tokens of its first row and of its first column.
        transposed: False: rows are queries and columns keys; True: the reverse.
        window: int32 scalar, or None.
        slope: float32 scalar, ALiBi's penalty of this head, or None.
        segments: those of the rows [rows] and of the columns [columns], or None.
    """

    rows: int
    columns: int
    row: Index
    column: Index
    transposed: bool
    window: Index | None
    slope: Array | None
    segments: tuple[Array, Array] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    def places(self) -> tuple[Array, Array]:
        """The tokens of queries and of keys, int32, each of the tile's shape."""
        row, column = (
            start
            + plgpu.broadcasted_iota(
                jnp.int32, self.shape, dim, layout=plgpu.Layout.WGMMA
            )
            for dim, start in enumerate((self.row, self.column))
        )
        return (column, row) if self.transposed else (row, column)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How raw products of queries and keys become scores.

    Attributes:
        options: of the call.
        length: tokens that are not padding.
    """

    options: Options
    length: int

    @property
    def unit(self) -> float:
        """What a score has to be multiplied with to be in units of log2.

        The product with it is part of the exponential's argument, and costs nothing.
        """
        simple = self.options.softcap is None and self.options.scale > 0
        return self.options.scale * LOG2_E if simple else 1.0

    def bend(self, raw: Array) -> Array:
        """Scores of raw products, capped if they are to be."""
        scale, cap = self.options.scale, self.options.softcap
        if cap is not None:
            return jnp.tanh(raw * (scale / cap)) * (cap * LOG2_E)
        return raw * (scale * LOG2_E / self.unit)

    def slope(self, raw: Array) -> Array | float:
        """The derivative by the raw product of a score in units of 1."""
        scale, cap = self.options.scale, self.options.softcap
        if cap is None:
            return scale
        bent = jnp.tanh(raw * (scale / cap))
        return (1.0 - bent * bent) * scale

    def place(self, raw: Array, tile: Tile, masked: bool) -> Array:
        """Scores with ALiBi, and with what is not seen set to `MASKED`.

        Args:
            raw: products, float32 [rows, columns].
            tile: where they are.
            masked: False where all of the tile is seen.

        Returns:
            scores, to be multiplied with `unit`.
        """
        scores = self.bend(raw)
        if not masked and tile.slope is None:
            return scores
        query, key = tile.places()
        if tile.slope is not None:
            apart = query - key if self.options.causal else jnp.abs(query - key)
            penalty = apart.astype(jnp.float32) * (tile.slope * (LOG2_E / self.unit))
            scores = scores - penalty
        if not masked:
            return scores
        return jnp.where(self._seen(query, key, tile), scores, MASKED)

    def _seen(self, query: Array, key: Array, tile: Tile) -> Array:
        seen = query >= key if self.options.causal else key < self.length
        if tile.window is not None:
            seen = seen & (query - key < tile.window)
            if not self.options.causal:
                seen = seen & (key - query < tile.window)
        if tile.segments is not None:
            rows, columns = tile.segments
            same = _spread(rows, tile, 0) == _spread(columns, tile, 1)
            seen = seen & same
        return seen


def _spread(x: Array, tile: Tile, dim: int) -> Array:
    return lax.broadcast_in_dim(x, tile.shape, [dim])
