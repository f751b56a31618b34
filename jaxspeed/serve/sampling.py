"""The next token from logits: temperature, top-k (Fan et al., 2018), top-p.

Top-p is the nucleus of Holtzman et al., 2020: the fewest most probable tokens whose
probabilities sum to at least p. The order is temperature, then k, then p among what k
left; of equally probable tokens the one with the lower id comes first.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: the logits are divided by it; 0 always takes the most probable.
        top_k: only the k most probable tokens can be drawn; None: all.
        top_p: only the nucleus of this probability can be drawn; None: all.
        seed: of the draws, 0 to 2**32 - 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature is {self.temperature}; give a positive number, or 0 to "
                "take the most probable token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}; give a probability above 0 and up to 1, or "
                "None for all"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; give one from 0 to 2**32 - 1")


def sample(
    logits: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling
) -> Int32[Array, " B"]:
    """One token id per row.

    Args:
        logits: unnormalised, any float dtype; the computation is in float32.
        key: random key of this draw; `sampling.seed` is for the caller to make it of.
        sampling: static under `jax.jit`.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Subtracting first keeps a tiny temperature from making two infinities.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    ranked, ids = lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p is not None:
        ranked = jnp.where(_nucleus(ranked, sampling.top_p), ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _nucleus(ranked: Float[Array, "B K"], probability: float) -> Bool[Array, "B K"]:
    """Which of the logits, in falling order, are in the nucleus.

    A token is in it while those before it sum to less than `probability`.
    """
    sums = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = jnp.pad(sums[:, :-1], ((0, 0), (1, 0)))
    return before < probability
