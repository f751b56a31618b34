"""An array of any shape as the matrix whose columns are quantized."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.quantize_pack.format import BLOCK

LANES = 128


@dataclasses.dataclass(frozen=True)
class View:
    """A matrix of `rows` and `columns` with the numbers of an array of shape `shape`.

    The last dim stays the columns, which moves nothing, unless whole blocks of rows
    would be much larger than the array: then all numbers go in columns of 128.
    """

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers of the array."""
        return math.prod(self.shape)

    @property
    def flat(self) -> bool:
        """Whether the columns are not the last dim."""
        if len(self.shape) < 2 or self.shape[-1] < LANES:
            return True
        rows = self.size // self.shape[-1]
        return _blocks(rows) * BLOCK > rows * 9 / 8

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return -(-self.size // LANES) if self.flat else self.size // self.columns

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return LANES if self.flat else self.shape[-1]

    @property
    def blocks(self) -> int:
        """Blocks of 256 rows, the last one not always full."""
        return _blocks(self.rows)

    def of(self, x: Array) -> Array:
        """The matrix of an array."""
        missing = self.rows * self.columns - self.size
        if missing:
            x = jnp.pad(x.reshape(-1), (0, missing))
        return x.reshape(self.rows, self.columns)

    def back(self, matrix: Array) -> Array:
        """The array of a matrix, which may have more rows."""
        if not self.flat:
            return matrix[: self.rows].reshape(self.shape)
        return matrix.reshape(-1)[: self.size].reshape(self.shape)


def _blocks(rows: int) -> int:
    return -(-rows // BLOCK)
