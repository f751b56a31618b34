"""What every implementation of block-sparse attention is given."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.pattern import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of one call.

    Attributes:
        q, k, v: queries, keys and values.
        segments: the document of each token, or None: all are of one.
        first_head: int32, which head of the layout the first head of `q` has.
    """

    q: Float[Array, "B S H K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G K"]
    segments: Int[Array, "B S"] | None
    first_head: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when the program is traced.

    Attributes:
        mask: which scores count.
        scale: factor of the scores.
    """

    mask: Mask
    scale: float
