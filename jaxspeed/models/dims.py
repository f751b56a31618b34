"""Names of the dims of a module's parameters, from the metadata of its variables."""

from typing import Any

import jax
from flax import nnx

from jaxspeed import spec
from jaxspeed.parallel.zero import SCANNED


def dims(variable: nnx.Variable) -> tuple[str | None, ...]:
    """A name for each dim of a variable, None for all where it declares no `dims`.

    Layers that `nnx.vmap` stacked have a dim in front that no weight declares; it is
    the one that a scan walks over.
    """
    own = tuple(variable.get_metadata().get("dims", ()))
    missing = len(variable.shape) - len(own)
    return ((SCANNED,) if own else (None,)) * missing + own


def leaves(state: nnx.State) -> nnx.State:
    """A `spec.Leaf` in place of each variable of `nnx.state(model)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: spec.Leaf(
            spec.path_name(path), tuple(variable.shape), dims(variable)
        ),
        state,
        is_leaf=is_variable,
    )


def is_variable(node: Any) -> bool:
    """Whether a node of a module or its state is a variable."""
    return isinstance(node, nnx.Variable)
