"""Tokens in the order of a tiling, and back."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels_pallas.arrays import pad_dim

NOWHERE = 2**30
"""Position of padding after the last cell: nothing sees it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the tokens of a sequence go.

    Attributes:
        length: tokens.
        cell: tokens that stay together.
        block: the padded length is a multiple of it.
        order: which cell is where; None: as they are.
    """

    length: int
    cell: int
    block: int
    order: Int[np.ndarray, " n"] | None

    @property
    def padded(self) -> int:
        """Tokens with those of padding."""
        cells = math.ceil(self.length / self.cell)
        return math.ceil(cells * self.cell / self.block) * self.block

    def positions(self) -> Int[np.ndarray, " padded"]:
        """The position of the token at each place, at least `length` for padding."""
        cells = math.ceil(self.length / self.cell)
        order = np.arange(cells) if self.order is None else self.order
        places = order[:, None] * self.cell + np.arange(self.cell)
        result = np.full(self.padded, NOWHERE, np.int32)
        result[: places.size] = places.ravel()
        return result

    def arrange(self, x: Array, axis: int) -> Array:
        """`x` with its tokens, along `axis`, in order and padded."""
        if self.order is not None:
            x = self._taken(x, axis, self.order)
        return pad_dim(x, axis, self.padded)

    def restore(self, x: Array, axis: int) -> Array:
        """What `arrange` was given."""
        if self.order is not None:
            x = self._taken(x, axis, np.argsort(self.order))
        return _cut(x, axis, self.length)

    def _taken(self, x: Array, axis: int, order: Int[np.ndarray, " n"]) -> Array:
        """Cells of `x` in `order`."""
        size = len(order) * self.cell
        x = pad_dim(_cut(x, axis, size), axis, size)
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        cells = x.reshape(*before, len(order), self.cell, *after)
        return jnp.take(cells, order, axis).reshape(*before, size, *after)


def _cut(x: Array, axis: int, size: int) -> Array:
    return x[(slice(None),) * axis + (slice(size),)]
