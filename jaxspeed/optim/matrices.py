"""Which leaves are weight matrices, and which of their dims belong to one layer's.

A leaf may hold the same weight of many layers, or experts, along a dim of its own.
What an optimizer does per matrix is done for each of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxspeed import spec
from jaxspeed.spec import Leaf

STACKED = ("layers", "experts")
"""Names of dims along which a leaf holds one weight per layer, or per expert."""
TABLES = ("vocabulary", "positions")
"""Names of dims whose entries are looked up, or predicted, by number."""


def is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is a weight matrix (per layer), not a norm's scale or a bias.

    Where dims have names it maps from or to the dim `model`; a bias of shape
    [heads, head] is none. Where they have none, two dims make a matrix.
    """
    own = [leaf.dims[dim] for dim in own_dims(leaf)]
    return len(own) >= 2 and ("model" in own or not any(own))


def own_dims(leaf: Leaf) -> tuple[int, ...]:
    """The dims of one layer's weight."""
    return tuple(dim for dim, name in enumerate(leaf.dims) if name not in STACKED)


def map_leaves(function: Callable[[Any, Leaf], Any], params: Any, leaves: Any) -> Any:
    """Maps over params and their leaves, past what `optax.partition` masked out.

    Args:
        function: (param, leaf) -> anything.
        params: a pytree.
        leaves: a pytree like it of `Leaf`, or None: no dim has a name.
    """

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda param, leaf: param if masked(param) else function(param, leaf),
        params,
        spec.leaves(params) if leaves is None else leaves,
        is_leaf=masked,
    )
