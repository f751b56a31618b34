"""How a kernel gets at a tile of a group's weights: the seam for other formats.

A format has arrays, the blocks of them that belong to a tile, and a way from those
blocks to numbers that the matrix unit takes. The kernels know nothing else of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

Ref = Any
Place = Callable[..., tuple[Any, Any, Any]]
"""From grid indices (and scalars) to (group, tile of the depth, tile of columns)."""


class Weights(Protocol):
    """Matrices w[G, K, N] in some format."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """G, K and N."""
        ...

    @property
    def arrays(self) -> Sequence[Array]:
        """What is read."""
        ...

    def specs(self, depth: int, columns: int, place: Place) -> list[pl.BlockSpec]:
        """The blocks of `arrays` for a tile [depth, columns]."""
        ...

    def load(self, refs: Sequence[Ref]) -> Array:
        """The tile [depth, columns], from the blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """Weights as they are."""

    array: Float[Array, "G K N"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """G, K and N."""
        groups, depth, columns = self.array.shape
        return groups, depth, columns

    @property
    def arrays(self) -> Sequence[Array]:
        """The one array."""
        return (self.array,)

    def specs(self, depth: int, columns: int, place: Place) -> list[pl.BlockSpec]:
        """A plain block."""
        return [pl.BlockSpec((None, depth, columns), place)]

    def load(self, refs: Sequence[Ref]) -> Array:
        """The block."""
        (block,) = refs
        return block[...]
