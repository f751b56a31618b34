"""Attention functions of the decoder: whole scores, or blockwise in a kernel.

An attention function is `(q, k, v, queries, keys, window, slopes) -> out`: shapes as in
`dense_attention`. The decoder takes any; `attention` is its default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.flash_attention import flash_attention

BLOCKWISE_FROM = 1024
"""Sequence length from which whole scores cost more memory than they are worth."""

FULL_WINDOW = 2**30
"""A window longer than any sequence, for layers that see everything."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand: positions within their document, and which document.

    Attributes:
        positions: int [B, S], restarting at 0 with every document.
        segments: int [B, S], a number per document of the row; tokens see only tokens
            of their own segment. 0 is padding.
    """

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


def visible(
    queries: Places, keys: Places, window: Int[Array, ""] | int | None
) -> Bool[Array, "B S T"]:
    """Which keys a query may see: its own document, not later, within the window."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask = (distance >= 0) & (queries.segments[:, :, None] == keys.segments[:, None, :])
    return mask if window is None else mask & (distance < window)


def dense_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    queries: Places,
    keys: Places,
    window: Int[Array, ""] | int | None,
    slopes: Float[Array, " H"] | None,
) -> Float[Array, "B S H K"]:
    """Softmax attention with whole scores in float32; H is a multiple of G.

    Args:
        q, k, v: this device's heads.
        queries, keys: where the S queries and T keys stand.
        window: how far back a query sees; None: to the start of its document.
        slopes: ALiBi's penalty per head and unit of distance, or None.
    """
    bias = None
    if slopes is not None:
        distance = queries.positions[:, None, :, None] - keys.positions[:, None, None]
        bias = -slopes[None, :, None, None] * distance.astype(jnp.float32)
    return masked_attention(q, k, v, visible(queries, keys, window)[:, None], bias)


def masked_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    mask: Bool[Array, "B #H S T"],
    bias: Float[Array, "B H S T"] | None = None,
) -> Float[Array, "B S H K"]:
    """Softmax attention with whole scores in float32, over keys that the mask allows.

    A query that sees no key at all gets the mean of the values.
    """
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = jnp.einsum("bsghk,btgk->bghst", q, k, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    if bias is not None:
        scores = scores + bias.reshape(scores.shape)
    shape = scores.shape[:3] if mask.shape[1] > 1 else (batch, 1, 1)
    mask = mask.reshape(*shape, *mask.shape[2:])
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bghst,btgk->bsghk", weights, v)
    return out.reshape(batch, length, heads, head_dim)


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    queries: Places,
    keys: Places,
    window: Int[Array, ""] | int | None,
    slopes: Float[Array, " H"] | None,
) -> Float[Array, "B S H K"]:
    """Blockwise for long self-attention, whole scores otherwise.

    Blockwise attention measures distance along the row, which within a document is the
    difference of positions as long as those count 0, 1, 2, ...
    """
    if queries is not keys or q.shape[1] < BLOCKWISE_FROM:
        return dense_attention(q, k, v, queries, keys, window, slopes)
    return flash_attention(
        q, k, v, segments=queries.segments, window=window, slopes=slopes
    )
