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

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def policy_named(name: str) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint`; None keeps everything.

    Raises:
        ValueError: an unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"remat policy {name!r}; choose one of {list(POLICIES)}")
    return POLICIES[name]
