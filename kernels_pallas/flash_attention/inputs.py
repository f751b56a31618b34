"""What every implementation of flash attention is given."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of one call.

    Attributes:
        q, k, v: queries, keys and values.
        segments: the document of each token, or None: all are of one.
        window: int32 scalar, how far back a query sees; None without a window.
        slopes: ALiBi's penalty per token of distance, or None.
        sinks: a logit per head that joins the normaliser and carries no value, or None.
    """

    q: Float[Array, "B S H K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G K"]
    segments: Int[Array, "B S"] | None
    window: Int[Array, ""] | None
    slopes: Float[Array, " H"] | None
    sinks: Float[Array, " H"] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when the program is traced.

    Attributes:
        scale: factor of the scores.
        window: the value of `Inputs.window` if it is known: blocks outside of it then
            are not in the program. None otherwise.
        causal: whether a query sees only keys that are not after it.
        softcap: a tanh bounds scores to (-softcap, softcap); None: nothing does.
    """

    scale: float
    window: int | None
    causal: bool = True
    softcap: float | None = None
