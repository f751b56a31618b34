"""Which activations a layer keeps for its backward pass, by name.

    none          keeps all of them
    full          keeps only the layer's input
    dots          keeps the results of matmuls, recomputes the rest
    dots_no_batch keeps the results of matmuls that have no batch dim (weights times
                  activations), recomputes attention

Weights that ZeRO-3 gathered are kept by none of them.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxspeed.parallel.zero import never_saved

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function` with its backward pass recomputing what `policy` does not keep.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r}; choose one of {list(POLICIES)}")
    return jax.checkpoint(function, policy=never_saved(POLICIES[policy]))
