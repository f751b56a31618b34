"""How a product gets at the weights of a group: the seam between formats and kernels.

Weights are numbers that the matrix unit takes as they are, times a scale for each
column or none. A format has arrays, the blocks of them that belong to a tile, and a way
from those blocks to the numbers; the kernels know nothing else of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.quant_matmul import QuantizedTensor
from kernels_pallas.quant_matmul.layouts import Native

Ref = Any
Place = Callable[..., tuple[Any, Any, Any]]
"""From grid indices (and scalars) to (group, tile of the depth, tile of columns)."""
Stored = Float[Array, "G K N"] | QuantizedTensor
"""What callers have."""


class Weights(Protocol):
    """Matrices w[G, K, N] in some format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """G, K and N."""
        ...

    @property
    def padded(self) -> tuple[int, ...]:
        """G, K and N as stored: what is added is zeros."""
        ...

    @property
    def arrays(self) -> Sequence[Array]:
        """What is read."""
        ...

    def numbers(self, group: Array, dtype: Any) -> Float[Array, "K N"]:
        """A whole matrix without its scales, padded."""
        ...

    def scales(self, group: Array) -> Float[Array, "1 N"] | None:
        """The scales of its columns, padded."""
        ...

    def specs(self, depth: int, columns: int, place: Place) -> list[pl.BlockSpec]:
        """The blocks of `arrays` for a tile [depth, columns]."""
        ...

    def load(self, refs: Sequence[Ref]) -> Array:
        """The numbers of a tile, from its blocks."""
        ...

    def load_scales(self, refs: Sequence[Ref]) -> Float[Array, "1 N"] | None:
        """The scales of a tile's columns, from its blocks."""
        ...


def of(w: Stored) -> Weights:
    """The format of these weights."""
    return PerColumn(w) if isinstance(w, QuantizedTensor) else Dense(w)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Weights as they are."""

    array: Float[Array, "G K N"]

    @property
    def shape(self) -> tuple[int, ...]:
        """G, K and N."""
        return self.array.shape

    @property
    def padded(self) -> tuple[int, ...]:
        """The same."""
        return self.array.shape

    @property
    def arrays(self) -> Sequence[Array]:
        """The one array."""
        return (self.array,)

    def numbers(self, group: Array, dtype: Any) -> Float[Array, "K N"]:
        """The matrix."""
        return lax.dynamic_index_in_dim(self.array, group, keepdims=False)

    def scales(self, group: Array) -> None:
        """None."""
        return None

    def specs(self, depth: int, columns: int, place: Place) -> list[pl.BlockSpec]:
        """A plain block."""
        return [pl.BlockSpec((None, depth, columns), place)]

    def load(self, refs: Sequence[Ref]) -> Array:
        """The block."""
        return refs[0][...]

    def load_scales(self, refs: Sequence[Ref]) -> None:
        """None."""
        return None


@dataclasses.dataclass(frozen=True)
class PerColumn:
    """Quantized weights, a scale for each column of each group."""

    tensor: QuantizedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """G, K and N."""
        return self.tensor.shape

    @property
    def padded(self) -> tuple[int, ...]:
        """K as a multiple of 256, N of 128."""
        return (*self.tensor.lead, *self.tensor.padded)

    @property
    def arrays(self) -> Sequence[Array]:
        """Codes, and scales [G, 1, N]."""
        return self.tensor.data, self.tensor.scales

    def numbers(self, group: Array, dtype: Any) -> Float[Array, "K N"]:
        """The numbers of the format: few bits, so bfloat16 has them exactly."""
        data = lax.dynamic_index_in_dim(self.tensor.data, group, keepdims=False)
        return self.tensor.format.values(data).astype(dtype)

    def scales(self, group: Array) -> Float[Array, "1 N"]:
        """In float32."""
        return lax.dynamic_index_in_dim(self.tensor.scales, group, keepdims=False)

    def specs(self, depth: int, columns: int, place: Place) -> list[pl.BlockSpec]:
        """Codes in their layout, and a row of scales."""
        layout = self.tensor.format.layout

        def slabs(*indices: Any) -> tuple[Any, ...]:
            group, row, column = place(*indices)
            return group, row, 0, 0, column

        def scales(*indices: Any) -> tuple[Any, ...]:
            group, _, column = place(*indices)
            return group, 0, column

        shape = layout.data_shape(depth, columns)
        native = isinstance(layout, Native)
        data = pl.BlockSpec((None, *shape), place if native else slabs)
        return [data, pl.BlockSpec((None, 1, columns), scales)]

    def load(self, refs: Sequence[Ref]) -> Array:
        """The carriers: bytes, or what the matrix unit has for int4."""
        data, layout = refs[0], self.tensor.format.layout
        if isinstance(layout, Native):
            return data[...]
        slabs = []
        for block in range(data.shape[0]):
            planes = [
                pltpu.bitcast(data[block, plane], jnp.uint32)
                for plane in range(layout.planes)
            ]
            slabs += layout.split(planes)
        return jnp.concatenate([pltpu.bitcast(x, layout.carrier) for x in slabs], 0)

    def load_scales(self, refs: Sequence[Ref]) -> Float[Array, "1 N"]:
        """With the factor between carriers and numbers."""
        return refs[1][...] * self.tensor.format.factor


def check(w: QuantizedTensor) -> None:
    """Raises a ValueError for quantized weights that no product takes."""
    if len(w.lead) != 1 or w.group is not None or w.zeros is not None:
        raise ValueError(
            f"w is {w.format_name} {w.shape} with group={w.group} and "
            f"{'no ' if w.zeros is None else ''}zero points; quantize [G, K, N] with "
            "group=None and symmetric=True, and not in a format that has groups"
        )
