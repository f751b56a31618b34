"""What every implementation of paged attention is given, and where a token lies."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def pages_shape(
    pages: int, page: int, groups: int, head_dim: int
) -> tuple[int, int, int, int, int]:
    """The shape [P, G, 2, page, K] of a pool of pages of `page` tokens.

    Of each page and key head the keys come first, index 0, then the values. Tokens are
    the rows of a tile, so that a page's keys enter a matmul as they lie, and heads come
    before them, so that a mesh axis can split them.
    """
    return pages, groups, 2, page, head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of one call.

    Attributes:
        q: queries of all sequences, one sequence after the other.
        pages: keys and values, see `pages_shape`.
        scales: float32, what keys (0) and values (1) of a head are multiplied with.
        table: int32, the pages of each sequence in order.
        lengths: int32, tokens of each sequence whose keys are in pages.
        starts: int32, the first query of each sequence, and the end of the last.
    """

    q: Float[Array, "T H K"]
    pages: Array
    scales: Float[Array, "G 2"]
    table: Int[Array, "S L"]
    lengths: Int[Array, " S"]
    starts: Int[Array, " S+1"]

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[3]

    @property
    def groups(self) -> int:
        """Key heads."""
        return self.pages.shape[1]

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[1] // self.groups

    @property
    def counts(self) -> Int[Array, " S"]:
        """Queries of each sequence."""
        return self.starts[1:] - self.starts[:-1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when the program is traced.

    Attributes:
        scale: factor of the scores.
        window: a query sees itself and the `window - 1` tokens before; None: all.
    """

    scale: float
    window: int | None


def sequence_of(starts: Int[Array, " S+1"], tokens: int) -> Int[Array, " T"]:
    """The sequence of each query; S after the last one."""
    place = jnp.arange(tokens, dtype=jnp.int32)
    return jnp.searchsorted(starts[1:], place, side="right").astype(jnp.int32)


def positions(
    starts: Int[Array, " S+1"], lengths: Int[Array, " S"], tokens: int
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """Sequence and position of each query: they are the last of their sequence."""
    sequence = sequence_of(starts, tokens)
    inside = jnp.minimum(sequence, lengths.shape[0] - 1)
    place = jnp.arange(tokens, dtype=jnp.int32)
    return sequence, lengths[inside] - starts[inside + 1] + place


def quantized(x: Float[Array, "*S"], dtype: jnp.dtype) -> Float[Array, "*S"]:
    """Scaled float32 numbers, in float32, inside of what `dtype` can hold.

    Whole numbers for an integer type; floating-point types round when converted.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(x), -127.0, 127.0)
    if dtype.itemsize > 1:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)
