"""Padding of arrays, and along which axes of a mesh they differ."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def pad_dim(x: Array, dim: int, size: int) -> Array:
    """`x` with zeros after the end of dim `dim`, up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, size - x.shape[dim])
    return jnp.pad(x, widths)


def varying(x: Array) -> frozenset[str]:
    """The mesh axes of the `shard_map` around along which `x` may differ."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x: Array, *others: Array) -> Array:
    """`x` marked as differing along every mesh axis that one of `others` does."""
    missing = frozenset().union(*map(varying, others)) - varying(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
