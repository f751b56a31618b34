"""Data parallelism: a mean over all samples, wherever they are.

A loss is carried as a total and a weight, so that the mean is that of one device even
when shards or micro-batches count different numbers of valid tokens (averaging the
shards' own means would not be).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """A weighted sum over the samples at hand; the loss is `total / weight`.

    Attributes:
        total: scalar, the sum of the weighted losses.
        weight: scalar, the sum of the weights (for example valid tokens); it must not
            depend on the parameters.
        metrics: scalars to report, each a mean under the same weight.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


def as_loss(returned: Any) -> Loss:
    """A `Loss` from what a user's loss function may return.

    Accepts a `Loss`, a scalar (the mean over the local batch), or a pair of a scalar
    and a dict of scalar metrics. Equal shards of the batch then have equal weight.

    Raises:
        TypeError: anything else.
    """
    if isinstance(returned, Loss):
        return returned
    pair = isinstance(returned, tuple) and len(returned) == 2
    value, metrics = (
        returned if pair and isinstance(returned[1], dict) else (returned, {})
    )
    is_scalar = isinstance(value, float) or (
        isinstance(value, jax.Array)
        and value.shape == ()
        and jnp.issubdtype(value.dtype, jnp.floating)
    )
    if not is_scalar:
        types = jax.tree.map(lambda x: getattr(x, "aval", type(x)), value)
        raise TypeError(
            "the loss function must return a scalar, (scalar, dict of metrics) or "
            f"js.Loss(total, weight); it returned {types}"
        )
    return Loss(jnp.asarray(value), jnp.ones((), jnp.float32), metrics)
