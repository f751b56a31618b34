"""Muon on hidden matrices, Adam on the rest. Jordan, 2024; Liu et al., 2502.16982.

Momentum is replaced by the nearest orthogonal matrix, per layer, with optax's
Newton-Schulz iteration. Weights of more than two dims (model, heads, head) are
matrices from or to the dim `model`.
"""

import math
from typing import Any

import optax
import optax.contrib
from jaxtyping import Array

from jaxspeed.optim.matrices import TABLES, is_matrix, map_leaves, own_dims
from jaxspeed.spec import Leaf


def scale_by_muon_and_adam(
    adam: optax.GradientTransformation,
    *,
    momentum: float,
    match_adam: bool,
    leaves: Any = None,
) -> optax.GradientTransformation:
    """The direction of both, to be followed by weight decay and learning rate.

    Args:
        adam: what the leaves that are not for Muon get.
        momentum: decay of Muon's average of gradients (Nesterov's form).
        match_adam: whether Muon's updates are scaled to Adam's root mean square,
            0.2 * sqrt(max(rows, columns)), so that both can share a learning rate;
            otherwise by sqrt(max(1, columns / rows)), as first published.
        leaves: a pytree like the params of `spec.Leaf`, or None: no dim has a name.
    """

    def label(_: Any, leaf: Leaf) -> str:
        return "muon" if _muon_dims(leaf) else "adam"

    def numbers(_: Any, leaf: Leaf) -> optax.contrib.MuonDimensionNumbers | None:
        dims = _muon_dims(leaf)
        return optax.contrib.MuonDimensionNumbers(*dims) if dims else None

    def shape_scale(update: Array, leaf: Leaf) -> Array:
        dims = _muon_dims(leaf)
        assert dims, f"parameter {leaf.path!r} is not for Muon"
        rows, columns = (math.prod(leaf.shape[dim] for dim in side) for side in dims)
        if match_adam:
            return update * (0.2 * math.sqrt(max(rows, columns)))
        return update * math.sqrt(max(1, columns / rows))

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum,
            weight_dimension_numbers=lambda params: map_leaves(numbers, params, leaves),
        ),
        optax.stateless(lambda updates, _: map_leaves(shape_scale, updates, leaves)),
    )
    return optax.partition(
        {"muon": muon, "adam": adam}, lambda params: map_leaves(label, params, leaves)
    )


def _muon_dims(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A leaf's dims as rows (in) and columns (out); None if it is not for Muon.

    Tables that are looked up by index are left to Adam, and so is the projection onto
    the vocabulary.
    """
    dims = own_dims(leaf)
    names = [leaf.dims[dim] for dim in dims]
    if not is_matrix(leaf) or set(names) & set(TABLES):
        return None
    if "model" not in names:
        return (dims[:1], dims[1:]) if len(dims) == 2 else None
    model = (dims[names.index("model")],)
    other = tuple(dim for dim in dims if dim not in model)
    return (model, other) if model < other else (other, model)
