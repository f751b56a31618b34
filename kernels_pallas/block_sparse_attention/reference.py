"""The meaning of block-sparse attention in plain jnp, with whole scores in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas.block_sparse_attention.inputs import Inputs, Options
from kernels_pallas.block_sparse_attention.pattern import Mask
from kernels_pallas.flash_attention.reference import MASKED


def attention(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Softmax attention over the keys that a query may see.

    Returns:
        the output in the dtype of `q`, and the log of the sum of exponentiated scores
        in float32; zeros and MASKED where a query sees nothing.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = options.scale * jnp.einsum(
        "bsgrk,btgk->bgrst",
        grouped.astype(jnp.float32),
        k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(batch, heads, length, length)
    seen = jnp.asarray(visible(options.mask))
    if len(seen) > 1:
        seen = lax.dynamic_slice_in_dim(seen, inputs.first_head, heads)
    seen = seen[None]
    if inputs.segments is not None:
        same = inputs.segments[:, :, None] == inputs.segments[:, None, :]
        seen = seen & same[:, None]
    scores = jnp.where(seen, scores, MASKED)
    some = scores.max(axis=-1) > MASKED / 2
    lse = jnp.where(some, jax.nn.logsumexp(scores, axis=-1), MASKED)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    out = jnp.einsum(
        "bgrst,btgk->bsgrk",
        weights.reshape(batch, groups, heads // groups, length, length),
        v.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.reshape(q.shape).astype(q.dtype), lse


def visible(mask: Mask) -> Bool[np.ndarray, "P S S"]:
    """Which keys a query sees in each head of the layout, by token."""
    layouts = np.stack([mask.pattern.layout(i) for i in mask.pattern.of_head])
    for axis in (1, 2):
        layouts = layouts.repeat(mask.block, axis=axis).take(
            range(mask.length), axis=axis
        )
    return np.tril(layouts) if mask.causal else layouts
