"""Next-token loss without whole logits.

The logits of a long sequence over a large vocabulary are the largest array of a
training step (8192 x 128256 in float32: 4.2 GB). They are made for a chunk of the
sequence at a time and made again in the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxspeed import comm
from jaxspeed.mesh import AXES
from jaxspeed.parallel import tensor

CHUNK_BYTES = 2**29
"""Float32 logits of one chunk take at most this."""


def chunk_count(batch: int, length: int, vocabulary: int) -> int:
    """The fewest chunks of a sequence whose logits fit in `CHUNK_BYTES`."""
    tokens = max(1, CHUNK_BYTES // (4 * batch * vocabulary))
    return -(-length // tokens)


def next_token_losses(
    logits_of: Callable[[Array], Array],
    x: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    *,
    vocabulary: int,
) -> Float[Array, "B S"]:
    """Cross-entropy in nats of each target.

    Args:
        logits_of: [B, c, D] -> [B, c, V@tensor], for any part c of the sequence.
        x: activations of the whole sequence.
        targets: token ids; the loss of a negative one has no meaning.
        vocabulary: entries of the logits on this device.
    """
    batch, length, _ = x.shape
    count = chunk_count(batch, length, vocabulary)
    if count == 1:
        return tensor.cross_entropy(logits_of(x), targets)

    size = -(-length // count)
    missing = ((0, 0), (0, count * size - length))
    x, targets = jnp.pad(x, (*missing, (0, 0))), jnp.pad(targets, missing)

    @jax.checkpoint
    def chunk(index: Array) -> Array:
        def part(y: Array) -> Array:
            return lax.dynamic_slice_in_dim(y, index * size, size, axis=1)

        return tensor.cross_entropy(logits_of(part(x)), part(targets))

    losses = lax.map(chunk, comm.vary(jnp.arange(count), AXES))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :length]
