"""What ZeRO's table says of parameters: gradients, and leaves that stay whole."""

import math
from typing import Any

import jax.numpy as jnp

from jaxspeed.parallel.zero import MASTER, SCANNED, Zero
from jaxspeed.plan.model_state import ModelState
from jaxspeed.spec import Leaf, Sizes, shard_shape

_ITEM = jnp.dtype(MASTER).itemsize


def gradient_bytes(state: ModelState, sizes: Sizes) -> int:
    """Column two of the table on one device: whole up to stage 1, then shards."""
    specs = [
        (leaf, place.shard if place.stage > 1 else place.whole)
        for leaf, place in state.leaves
    ]
    return _ITEM * sum(
        math.prod(shard_shape(leaf.shape, spec, sizes)) for leaf, spec in specs
    )


def whole_leaves(zero: Zero, state: ModelState, sizes: Sizes) -> list[dict[str, Any]]:
    """The parameters that ZeRO would split and does not.

    Returns:
        `{"leaf", "shape", "bytes", "reason"}` each; bytes are those of the weights on
        one device, the reason is the rule that keeps the leaf whole.
    """
    return [
        {
            "leaf": leaf.path,
            "shape": list(leaf.shape),
            "bytes": _ITEM * math.prod(shard_shape(leaf.shape, place.whole, sizes)),
            "reason": _reason(zero, leaf, sizes),
        }
        for leaf, place in state.leaves
        if leaf.path in state.replicated
    ]


def _reason(zero: Zero, leaf: Leaf, sizes: Sizes) -> str:
    dims = [n for n, dim in zip(leaf.shape, leaf.dims, strict=True) if dim != SCANNED]
    size = math.prod(dims)
    if size < zero.min_size:
        return f"{size} elements per layer, under zero.min_size={zero.min_size}"
    axes = " or ".join(f"{axis} {sizes[axis]}" for axis in zero.axes if sizes[axis] > 1)
    return f"no dim of {tuple(dims)} divides by {axes}"
