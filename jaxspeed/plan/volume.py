"""Bytes that a training step sends over each mesh axis, by the papers' formulas.

ZeRO: Rajbhandari et al., 2020, section 7, and the table in `parallel.zero`. Tensor
parallelism with a split sequence: Korthikanti et al., 2022, section 4.2.2. Over n
devices an all-gather or reduce-scatter of b bytes sends b (n-1)/n, an all-reduce twice
that. Scalars (the loss, norms of gradients) are left out.
"""

import math
from collections.abc import Iterable

import jax.numpy as jnp

from jaxspeed.chips import GPUS_PER_HOST, Chip
from jaxspeed.mesh import AXES
from jaxspeed.models.next_token import chunk_count
from jaxspeed.parallel.zero import MASTER, SCANNED, Placement
from jaxspeed.plan.activations import FLOAT32, Activations
from jaxspeed.plan.model_state import ModelState
from jaxspeed.spec import Leaf, Sizes, all_axes, shard_shape

Volume = dict[str, float]
"""Bytes that one device sends, by axes as `plan.bytes_by_axis` names them."""


def step_volume(
    state: ModelState,
    activations: Activations,
    sizes: Sizes,
    *,
    remat: str,
    accumulation: int,
) -> Volume:
    """What ZeRO and tensor parallelism send in a step.

    Args:
        state: where each parameter lies.
        activations: of one micro-batch.
        sizes: size of every mesh axis.
        remat: the policy, a name in `models.remat`.
        accumulation: micro-batches in a step.
    """
    total: Volume = {}
    for leaf, place in state.leaves:
        uses = 2 if activations.model.tied and leaf.path == "embedding/tokens" else 1
        parts = _leaf_volume(
            leaf, place, sizes, state.has_master, accumulation=accumulation, uses=uses
        )
        for axes, sent in parts:
            _add(total, axes, sent)
    _add(total, ("tensor",), accumulation * _tensor_volume(activations, remat))
    return total


def link_seconds(volume: Volume, sizes: Sizes, chip: Chip) -> dict[str, float]:
    """How long each entry of a volume takes at the links' full bandwidth.

    On a torus collectives are rings (`rings`), one after the other if there are
    several, each both ways around on two links. Two devices have one between them. GPUs
    have a switch, but for groups of several hosts, which the data center's network
    joins.
    """
    seconds = {}
    for axes, sent in volume.items():
        named = axes.split("+")
        group = math.prod(sizes[axis] for axis in named)
        # A group's devices lie within so many that follow each other in the mesh.
        outermost = min(AXES.index(axis) for axis in named)
        span = math.prod(sizes[axis] for axis in AXES[outermost:])
        if chip.torus_dims:
            rate = chip.link_bytes_per_second * (2 if group > 2 else 1)
        elif span > GPUS_PER_HOST:
            rate = chip.network_bytes_per_second
        else:
            rate = chip.link_bytes_per_second
        seconds[axes] = sent / rate
    return seconds


def _leaf_volume(
    leaf: Leaf,
    place: Placement,
    sizes: Sizes,
    has_master: bool,
    *,
    accumulation: int,
    uses: int,
) -> Iterable[tuple[tuple[str, ...], float]]:
    """(axes, bytes) that one leaf costs in a step.

    Stage 3 gathers a layer twice but for the last one, whose weights stay for the
    backward pass; the head and the embedding once. Stages 2 and 3 reduce every use of a
    leaf in every micro-batch, stages 0 and 1 once.
    """
    whole = math.prod(shard_shape(leaf.shape, place.whole, sizes))
    wire = jnp.dtype(place.wire).itemsize
    split = place.axes if place.stage else ()
    shards = math.prod(sizes[axis] for axis in split)
    if place.stage == 3:
        layers = leaf.shape[0] if SCANNED in leaf.dims else 0
        gathers = accumulation * (2 - 1 / layers if layers else 1)
        gathered = gathers * jnp.dtype(place.compute).itemsize
    else:
        gathered = jnp.dtype(place.compute if has_master else MASTER).itemsize
    reduced = wire * (accumulation * uses if place.stage > 1 else 1)
    yield split, whole * (gathered + reduced) * (shards - 1) / shards
    left = [a for a in AXES if a not in all_axes(place.optimizer) and sizes[a] > 1]
    copies = math.prod(sizes[axis] for axis in left)
    yield tuple(left), 2 * whole / shards * wire * (copies - 1) / copies


def _tensor_volume(activations: Activations, remat: str) -> float:
    """Bytes over `tensor` in one micro-batch.

    A block enters and leaves its two column-split parts, forward and backward. A
    backward pass that recomputes the layer does so again, except for the last
    reduce-scatter, whose result it does not read.
    """
    shards, model = activations.shards, activations.model
    again = remat != "none"
    if activations.split_tokens < activations.tokens:
        passes = model.num_layers * (8 + (3 if again else 0)) + 4
    else:  # `leave` is an all-reduce, `enter` nothing; backward the other way round
        passes = 2 * (model.num_layers * (4 + (1 if again else 0)) + 2)
    # The maximum, the normaliser and the target's logit of every token; those of a
    # chunk once more in the backward pass, but for the last.
    columns = model.padded_vocab // shards
    chunks = chunk_count(activations.sequences, activations.length, columns)
    sums = 3 if chunks == 1 else 5
    sent = passes * activations.whole_stream() + 2 * sums * activations.tokens * FLOAT32
    return sent * (shards - 1) / shards


def _add(total: Volume, axes: Iterable[str], sent: float) -> None:
    key = "+".join(axis for axis in AXES if axis in set(axes))
    if sent:
        total[key] = total.get(key, 0.0) + sent
