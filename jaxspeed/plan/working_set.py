"""What is alive beside the state at the fullest moment of a step, by formula.

Three moments can be the fullest: the loss, when all layers' activations are kept and
logits exist; the backward pass of one layer, with that layer's weights, activations and
gradients; and the end, when gradients are whole and the update begins.
"""

import dataclasses
import math

import jax.numpy as jnp

from jaxspeed.models.next_token import chunk_count
from jaxspeed.parallel.zero import MASTER, SCANNED
from jaxspeed.plan.activations import Activations
from jaxspeed.plan.model_state import ModelState
from jaxspeed.spec import Sizes, shard_shape


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """Bytes on one device at the fullest moment, state and stored gradients apart.

    Attributes:
        moment: `loss` or `layer`.
        saved_bytes: what all layers keep for the backward pass.
        weights_bytes: copies of weights in the compute dtype: gathered or cast.
        gradients_bytes: gradients that are not reduced yet.
        computing_bytes: activations of the layer, or of the loss, at work.
    """

    moment: str
    saved_bytes: int
    weights_bytes: int
    gradients_bytes: int
    computing_bytes: int

    @property
    def bytes(self) -> int:
        """All together."""
        held = self.saved_bytes + self.weights_bytes
        return held + self.gradients_bytes + self.computing_bytes


def gradient_bytes(state: ModelState, sizes: Sizes, *, accumulation: int) -> int:
    """Gradients of all leaves as the backward pass stores them.

    Stages 2 and 3 store float32 shards; stages 0 and 1 whole gradients in the compute
    dtype. Where micro-batches add up, a float32 sum of the same shape lies beside.
    """
    total = 0
    for leaf, place in state.leaves:
        reduced = place.stage >= 2
        spec = place.optimizer if reduced else place.whole
        width = jnp.dtype(MASTER if reduced else place.compute).itemsize
        if accumulation > 1:
            width += jnp.dtype(MASTER).itemsize
        total += math.prod(shard_shape(leaf.shape, spec, sizes)) * width
    return total


def working_set(
    state: ModelState, activations: Activations, sizes: Sizes, *, remat: str
) -> WorkingSet:
    """The fullest moment of a step.

    Args:
        state: where each parameter lies.
        activations: of one micro-batch.
        sizes: size of every mesh axis.
        remat: the policy, a name in `models.remat`.
    """
    weights = _Weights.of(state, sizes)
    saved = activations.model.num_layers * activations.saved(remat)
    loss = WorkingSet(
        moment="loss",
        saved_bytes=saved,
        weights_bytes=weights.cast + weights.prefetched // 2 + weights.head,
        gradients_bytes=weights.head_gradient,
        computing_bytes=loss_bytes(activations),
    )
    layer = WorkingSet(
        moment="layer",
        saved_bytes=saved,
        weights_bytes=weights.cast + weights.prefetched,
        gradients_bytes=weights.layer_gradients,
        computing_bytes=layer_bytes(activations),
    )
    return max(loss, layer, key=lambda moment: moment.bytes)


def layer_bytes(activations: Activations) -> int:
    """Activations at work in the backward pass of one layer.

    In the feed-forward: its hidden layers and their gradients; in attention: queries,
    keys, values and what it returned, each with its gradient; and where attention has
    whole scores, those, the softmax, its gradient, theirs, and a copy.
    """
    gated = activations.model.feed_forward.gated
    feed_forward = (5 if gated else 3) * activations.hidden()
    attention = 2 * (activations.projections() + activations.attended())
    if not activations.blockwise:
        attention += 5 * activations.scores()
    return max(feed_forward, attention) + 3 * activations.whole_stream()


def loss_bytes(activations: Activations) -> int:
    """The logits of one chunk, which their gradient replaces, in the compute dtype."""
    columns = activations.model.padded_vocab // activations.shards
    chunks = chunk_count(activations.sequences, activations.length, columns)
    logits = activations.tokens // chunks * columns
    return logits * activations.width + 2 * activations.whole_stream()


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of weights and of whole gradients that exist for a while.

    Attributes:
        cast: all weights in the compute dtype where float32 ones are stored whole.
        prefetched: two layers, one in use and one on its way.
        layer_gradients: two layers', one at work and one being reduced.
        head, head_gradient: of the projection to the vocabulary.
    """

    cast: int
    prefetched: int
    layer_gradients: int
    head: int
    head_gradient: int

    @classmethod
    def of(cls, state: ModelState, sizes: Sizes) -> "_Weights":
        cast = prefetched = gradients = head = head_gradient = 0
        for leaf, place in state.leaves:
            width = jnp.dtype(place.compute).itemsize
            whole = math.prod(shard_shape(leaf.shape, place.whole, sizes)) * width
            if place.stage == 0 and place.compute != MASTER:
                cast += whole
            if place.stage >= 2 and SCANNED in leaf.dims:
                prefetched += 2 * whole // leaf.shape[0]
                gradients += 2 * whole // leaf.shape[0]
            elif place.stage >= 2 and "vocabulary" in leaf.dims:
                head = max(head, whole if place.stage == 3 else 0)
                head_gradient = max(head_gradient, whole)
        return cls(cast, prefetched, gradients, head, head_gradient)
