"""Tensor parallelism. Shoeybi et al., 2019 (Megatron-LM); Korthikanti et al., 2022.

Attention is split by heads, the feed-forward by its hidden dim, the embedding and the
logits by vocabulary, all over mesh axis `tensor`. The first matmul of a block is
split by columns and needs the whole sequence; the second is split by rows and leaves
partial sums:

    x [B, S@tensor, D] --enter--> [B, S, D] @ [D, F@tensor] -> [B, S, F@tensor]
                                  [B, S, F@tensor] @ [F@tensor, D] -> partial [B, S, D]
                       --leave--> [B, S@tensor, D]

`enter` is an all-gather and `leave` a reduce-scatter over the sequence, so norms and
residuals between the blocks work on 1/T of the sequence (Megatron's sequence
parallelism); each is the other's backward. A sequence that T does not divide (a
decoding step has length 1) stays whole: `leave` is then an all-reduce.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxspeed import comm
from jaxspeed.spec import Leaf, Rule, Sizes, split

AXIS = "tensor"
SPLIT_DIMS = ("heads", "kv_heads", "feed_forward", "vocabulary")
"""Names of the dims that are split over `tensor`."""


def rule(sizes: Sizes) -> Rule:
    """Splits heads, feed-forward and vocabulary dims over `tensor`.

    Key and value heads that `tensor` does not divide (they may be fewer than the axis)
    stay whole, and each device uses those that its queries need (`local_kv_heads`).

    Raises:
        ValueError: `tensor` does not divide a dim; says which sizes would.
    """
    size = sizes[AXIS]

    def refine(leaf: Leaf, spec: PartitionSpec) -> PartitionSpec:
        for dim, name in enumerate(leaf.dims):
            if size == 1 or name not in SPLIT_DIMS:
                continue
            if leaf.shape[dim] % size == 0:
                spec = split(leaf, spec, dim, (AXIS,))
            elif name != "kv_heads":
                raise ValueError(_indivisible(leaf, dim, size))
        return spec

    return refine


def _indivisible(leaf: Leaf, dim: int, size: int) -> str:
    length, name = leaf.shape[dim], leaf.dims[dim]
    works = [n for n in range(1, min(length, 4 * size) + 1) if length % n == 0]
    advice = f"tensor can be one of {works}"
    if name == "vocabulary":
        advice += f", or set vocab_multiple to a multiple of {size}"
    return (
        f"mesh axis tensor={size} does not divide dim {name!r} of {leaf.path!r} "
        f"(shape {leaf.shape}, length {length}); {advice}"
    )


@dataclasses.dataclass(frozen=True)
class Region:
    """Layout of the activations between tensor-parallel blocks.

    Attributes:
        split: the sequence is split over `tensor` (else every device holds it whole).
    """

    split: bool

    @classmethod
    def of(cls, length: int) -> "Region":
        """The layout for sequences of `length` here."""
        return cls(split=length % comm.axis_size(AXIS) == 0)

    def scatter(self, x: Array) -> Array:
        """Into the region, from an array every device holds whole: [B, S, ...]."""
        # [B, S, ...] -> [B, S@tensor, ...], nothing sent
        return comm.shard(x, AXIS, dim=1) if self.split else x

    def enter(self, x: Float[Array, "B s D"]) -> Float[Array, "B S D"]:
        """Out of the region, before a column-split matmul."""
        # [B, S@tensor, D] -> [B, S, D]
        return comm.all_gather(x, AXIS, dim=1) if self.split else x

    def leave(self, x: Float[Array, "B S D"]) -> Float[Array, "B s D"]:
        """Back into the region, after a row-split matmul: sums the parts."""
        if self.split:
            # [B, S, D] partial sums -> [B, S@tensor, D]
            return comm.reduce_scatter(x, AXIS, dim=1)
        # [B, S, D] partial sums -> [B, S, D]
        return comm.all_reduce(x, AXIS)


def embed(
    table: Float[Array, "v D"], tokens: Int[Array, "B S"], region: Region
) -> Float[Array, "B s D"]:
    """Rows of a vocabulary-split table `[V@tensor, D]`: each device adds its own."""
    row = tokens - comm.axis_index(AXIS) * table.shape[0]
    here = (row >= 0) & (row < table.shape[0])
    rows = table[jnp.where(here, row, 0)]
    return region.leave(jnp.where(here[..., None], rows, jnp.zeros((), table.dtype)))


def cross_entropy(
    logits: Float[Array, "B S v"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """Cross-entropy in nats from vocabulary-split logits `[B, S, V@tensor]`.

    Whole logits never exist: one maximum and two sums per token cross the network.
    """
    logits = logits.astype(jnp.float32)
    largest = comm.all_max(lax.stop_gradient(logits.max(axis=-1)), AXIS)
    exponentials = jnp.exp(logits - largest[..., None]).sum(axis=-1)
    # [B, S] partial sums -> [B, S]
    log_normaliser = jnp.log(comm.all_reduce(exponentials, AXIS)) + largest
    # A comparison instead of an index: its backward pass is elementwise, no scatter.
    columns = vocabulary_columns(logits.shape[-1])
    picked = jnp.where(columns == targets[..., None], logits, 0.0).sum(axis=-1)
    # [B, S] partial sums (one device has the target) -> [B, S]
    target_logit = comm.all_reduce(picked, AXIS)
    return log_normaliser - target_logit


def vocabulary_columns(size: int) -> Int[Array, " v"]:
    """Which entries of the vocabulary this device's `size` logits belong to."""
    return comm.axis_index(AXIS) * size + jnp.arange(size)


def whole_logits(logits: Float[Array, "B S v"]) -> Float[Array, "B S V"]:
    """Logits of the whole vocabulary, for sampling and for users who ask for them."""
    # [B, S, V@tensor] -> [B, S, V]
    return comm.all_gather(logits, AXIS, dim=-1)


def local_heads(per_head: Float[Array, " H"]) -> Float[Array, " h"]:
    """The entries of a constant `[H]` that belong to this device's heads."""
    # [H] -> [H@tensor], nothing sent
    return comm.shard(per_head, AXIS, dim=0)


def first_head(num_heads: int) -> Array | int:
    """The number, among all, of the first of this device's `num_heads` query heads."""
    return comm.axis_index(AXIS) * num_heads


def num_local_kv_heads(num_kv_heads: int, num_heads: int) -> int:
    """How many key and value heads each device attends with."""
    size = comm.axis_size(AXIS)
    if num_kv_heads % size == 0:
        return num_kv_heads // size
    return 1 if size % num_kv_heads == 0 else num_heads // size


def local_kv_heads(
    weight: Float[Array, "... G K"], num_kv_heads: int, num_heads: int
) -> Float[Array, "... g K"]:
    """The key or value heads that this device's query heads attend with.

    Where `tensor` divides the heads the weight is split already, as a rule. Otherwise
    every device holds all of them and takes what it needs: its own, one, if the axis is
    a multiple of their number, or one for each of its query heads. The gradient is
    summed over `tensor` like that of any leaf which that axis does not split.
    """
    size = comm.axis_size(AXIS)
    if weight.shape[-2] * size == num_kv_heads:
        return weight
    weight, mine = comm.vary(weight, AXIS), comm.axis_index(AXIS)
    if num_kv_heads % size == 0:
        # [..., G, K] -> [..., G@tensor, K]
        count = num_kv_heads // size
        return lax.dynamic_slice_in_dim(weight, mine * count, count, weight.ndim - 2)
    if size % num_kv_heads == 0:
        # [..., G, K] -> [..., 1, K]: T / G neighbouring devices take the same head
        head = mine * num_kv_heads // size
        return lax.dynamic_slice_in_dim(weight, head, 1, axis=weight.ndim - 2)
    queries = mine * (num_heads // size) + jnp.arange(num_heads // size)
    # [..., G, K] -> [..., H@tensor, K]: a head per query head
    return jnp.take(weight, queries * num_kv_heads // num_heads, axis=-2)
