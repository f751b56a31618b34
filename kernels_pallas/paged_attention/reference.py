"""The meaning of paged attention in plain jnp: every query with all of its keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.paged_attention.inputs import (
    Inputs,
    Options,
    positions,
    quantized,
)


def attention(options: Options, inputs: Inputs) -> Float[Array, "T H K"]:
    """A query at position p sees keys p - window < j <= p; zeros without a sequence."""
    tokens, heads, head_dim = inputs.q.shape
    sequences, slots = inputs.table.shape
    sequence, position = positions(inputs.starts, inputs.lengths, tokens)
    pool = inputs.pages.astype(jnp.float32) * inputs.scales[:, :, None, None]
    inside = jnp.minimum(sequence, sequences - 1)
    # [S, L, G, 2, page, K] -> [S, G, 2, L * page, K]
    own = jnp.moveaxis(pool[inputs.table], 1, 3)
    own = own.reshape(*own.shape[:3], slots * inputs.page, head_dim)[inside]
    q = inputs.q.reshape(tokens, inputs.groups, inputs.shared, head_dim)
    highest = jax.lax.Precision.HIGHEST
    scores = options.scale * jnp.einsum(
        "tgrk,tgjk->tgrj", q.astype(jnp.float32), own[:, :, 0], precision=highest
    )
    distance = position[:, None] - jnp.arange(slots * inputs.page, dtype=jnp.int32)
    seen = distance >= 0
    if options.window is not None:
        seen = seen & (distance < options.window)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    some = seen.any(axis=1) & (sequence < sequences)
    scores = jnp.where(some[:, None, None, None], scores, 0.0)
    weights = jax.nn.softmax(scores, axis=-1)
    values = jnp.where(seen[:, None, :, None], own[:, :, 1], 0.0)
    out = jnp.einsum("tgrj,tgjk->tgrk", weights, values, precision=highest)
    out = jnp.where(some[:, None, None, None], out, 0.0)
    return out.reshape(tokens, heads, head_dim).astype(inputs.q.dtype)


def write(inputs: Inputs, new: Float[Array, "T G 2 K"]) -> Array:
    """The pages with the new tokens' keys and values where their positions say."""
    tokens = new.shape[0]
    sequences, slots = inputs.table.shape
    sequence, position = positions(inputs.starts, inputs.lengths, tokens)
    slot = position // inputs.page
    fits = (sequence < sequences) & (position >= 0) & (slot < slots)
    row = jnp.minimum(sequence, sequences - 1)
    page = inputs.table[row, jnp.clip(slot, 0, slots - 1)]
    page = jnp.where(fits, page, inputs.pages.shape[0])
    scaled = new.astype(jnp.float32) / inputs.scales[:, :, None]
    numbers = quantized(scaled, inputs.pages.dtype).astype(inputs.pages.dtype)
    return inputs.pages.at[page, :, :, position % inputs.page].set(numbers, mode="drop")
