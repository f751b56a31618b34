"""The meaning of flash attention in plain jnp, with whole scores in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.inputs import Inputs, Options

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that is not seen: finite, so that differences of two are not NaN."""


def attention(
    options: Options, inputs: Inputs
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S"]]:
    """Softmax attention; query i sees key j of its segment if 0 <= i - j < window.

    Without causality it does if |i - j| < window.

    Returns:
        the output in the dtype of `q`, and the log of the sum of exponentiated scores,
        the head's sink among them, in float32.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    segments, slopes = inputs.segments, inputs.slopes
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = options.scale * jnp.einsum(
        "bsgrk,btgk->bgrst",
        grouped.astype(jnp.float32),
        k.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(batch, heads, length, length)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    place = jnp.arange(length, dtype=jnp.int32)
    distance = place[:, None] - place[None, :]
    far = jnp.abs(distance)
    if slopes is not None:
        penalty = slopes[:, None, None] * far[None].astype(jnp.float32)
        scores = scores - penalty[None]
    seen = (distance >= 0 if options.causal else far >= 0)[None]
    if inputs.window is not None:
        seen = seen & (far < inputs.window)[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.where(seen[:, None], scores, MASKED)
    lse = jax.nn.logsumexp(scores, axis=-1)
    if inputs.sinks is not None:
        lse = jnp.logaddexp(lse, inputs.sinks[None, :, None])
    weights = jnp.exp(scores - lse[..., None])
    out = jnp.einsum(
        "bgrst,btgk->bsgrk",
        weights.reshape(batch, groups, heads // groups, length, length),
        v.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.reshape(q.shape).astype(q.dtype), lse
