"""ZeRO: every piece of model state stored once. Rajbhandari et al., 2020.

The paper's table, with Ψ parameters over N devices:

    stage | parameters | gradients | optimizer state | sent per step, in elements
    ------|------------|-----------|-----------------|---------------------------------
      0   | whole      | whole     | whole           | all-reduce                    2Ψ
      1   | whole      | whole     | shard           | reduce-scatter, all-gather    2Ψ
      2   | whole      | shard     | shard           | reduce-scatter, all-gather    2Ψ
      3   | shard      | shard     | shard           | all-gather twice, reduce-sc.  3Ψ

Stage 1 reduces once per step, after all micro-batches; stage 2 reduces each layer's
gradient inside the backward pass, so whole gradients never exist. Stage 3 gathers a
layer's weights where they are used and again in the backward pass. The mesh axis
`replica` repeats the shards (hybrid sharding): gradients are reduced over it last.

A leaf is split on one dim. The loss function sees a `Shard` wherever whole gradients
or whole parameters must not exist for long; `gather` turns it into the array:

    def block(x, layer):
        return gather(layer)(x), None          # whole for this layer only

    x, _ = lax.scan(jax.checkpoint(block), x, layers)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxspeed import comm
from jaxspeed.mesh import AXES
from jaxspeed.spec import Leaf, Rule, Sizes, all_axes, axes_of, split

SCANNED = "layers"
"""Name of the dim that a layer scan walks over; it is never split by ZeRO."""

GATHERED = "zero gathered"
"""Checkpoint name of weights that are whole only while they are used."""

MASTER = jnp.float32
"""Dtype of the weights that the optimizer updates, and of accumulated gradients."""


@dataclasses.dataclass(frozen=True)
class Zero:
    """What ZeRO splits.

    Attributes:
        stage: 0 to 3, a row of the paper's table.
        min_size: leaves with fewer elements (per layer) stay whole in every column.
        axes: the mesh axes over which state is split.
        reduce_dtype: dtype in which gradients travel and are summed; None is the
            compute dtype.
    """

    stage: int = 0
    min_size: int = 4096
    axes: tuple[str, ...] = ("data", "expert", "seq")
    reduce_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero.stage is {self.stage!r}; it must be 0, 1, 2 or 3")
        unknown = [axis for axis in self.axes if axis not in AXES]
        if unknown:
            raise ValueError(f"zero.axes names {unknown}; the mesh axes are {AXES}")
        if self.reduce_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"zero.reduce_dtype is {self.reduce_dtype!r}; it must be None, "
                "'float32', 'bfloat16' or 'float16'"
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one leaf lives: its row of the table.

    Attributes:
        whole: spec with ZeRO's axes left out (tensor parallelism may still split it).
        shard: spec with ZeRO's axes; equal to `whole` for a leaf that stays whole.
        stage: the effective stage: 0 for a leaf that stays whole.
        dim: the dim that ZeRO splits, counted from the end (-1 is the last).
        axes: the axes that split it.
        compute: dtype in which the loss function sees the leaf.
        wire: dtype in which its gradient is reduced.
    """

    whole: PartitionSpec
    shard: PartitionSpec
    stage: int
    dim: int
    axes: tuple[str, ...]
    compute: Any
    wire: Any

    @property
    def params(self) -> PartitionSpec:
        """Column one: the parameters."""
        return self.shard if self.stage == 3 else self.whole

    @property
    def optimizer(self) -> PartitionSpec:
        """Column three: optimizer state, master weights and reduced gradients."""
        return self.shard if self.stage >= 1 else self.whole


def rule(zero: Zero, sizes: Sizes) -> Rule:
    """Splits a leaf over ZeRO's axes on the dim that divides best.

    The largest number of shards wins, then a dim that no other axis splits, then the
    first dim: its shards lie one after another in memory, so a gather moves nothing
    else. Where no dim divides by all axes, the largest subset that divides one.
    """
    active = tuple(axis for axis in zero.axes if sizes[axis] > 1)
    subsets = [
        subset
        for count in range(len(active), 0, -1)
        for subset in itertools.combinations(active, count)
    ]

    def refine(leaf: Leaf, spec: PartitionSpec) -> PartitionSpec:
        dims = [dim for dim, name in enumerate(leaf.dims) if name != SCANNED]
        if math.prod(leaf.shape[dim] for dim in dims) < zero.min_size:
            return spec
        best: tuple[tuple[int, bool, int], int, tuple[str, ...]] | None = None
        for dim, subset in itertools.product(dims, subsets):
            taken = axes_of(spec, dim)
            shards = math.prod(sizes[axis] for axis in subset)
            here = leaf.shape[dim] // math.prod(sizes[axis] for axis in taken)
            if here % shards == 0:
                rank = (shards, not taken, -dim)
                if best is None or rank > best[0]:
                    best = (rank, dim, subset)
        return spec if best is None else split(leaf, spec, best[1], best[2])

    return refine


def place(
    zero: Zero, leaf: Leaf, whole: PartitionSpec, *, sizes: Sizes, compute: Any
) -> Placement:
    """The row of ZeRO's table for one leaf that other strategies split as `whole`."""
    shard = rule(zero, sizes)(leaf, whole)
    wire = jnp.dtype(zero.reduce_dtype or compute)
    for dim in range(len(leaf.shape)):
        added = tuple(a for a in axes_of(shard, dim) if a not in axes_of(whole, dim))
        if added:
            at = dim - len(leaf.shape)
            return Placement(whole, shard, zero.stage, at, added, compute, wire)
    return Placement(whole, whole, 0, -1, (), compute, wire)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """A leaf of which this device holds one part; `gather` gives the array.

    A pytree, so a layer scan slices it like the array it stands for.

    Attributes:
        value: this device's shard; its gradient arrives already reduced.
        whole: the whole leaf where it exists anyway (stage 2), else None.
        placement: static.
    """

    value: Array
    whole: Array | None
    placement: Placement = dataclasses.field(metadata=dict(static=True))


def gather(tree: Any) -> Any:
    """`tree` with every `Shard` replaced by the whole array it stands for.

    Arrays pass through, so a model that calls it runs under every stage, and without
    an engine. Works on any pytree, flax modules included. Call it where the weights
    are used, inside the scan over layers and inside `jax.checkpoint`, and no more than
    that layer is whole at a time.
    """

    def materialise(leaf: Any) -> Any:
        if not isinstance(leaf, Shard):
            return leaf
        return _materialise(leaf.placement, leaf.value, leaf.whole)

    return jax.tree.map(materialise, tree, is_leaf=lambda x: isinstance(x, Shard))


def gather_shards(shards: Sequence[Shard]) -> list[Array]:
    """The arrays that `shards` stand for, in the compute dtype, in few messages.

    Not to be differentiated; `gather` is.
    """
    wholes = [shard.whole for shard in shards]
    for axes, members in _by_axes(shards, lambda shard: shard.placement.axes):
        missing = [i for i in members if wholes[i] is None]
        values = [shards[i].value.astype(shards[i].placement.compute) for i in missing]
        dims = [shards[i].placement.dim for i in missing]
        # [..., n@axes, ...] -> [..., n, ...] each
        gathered = comm.all_gather_coalesced(values, axes, dims=dims)
        for i, whole in zip(missing, gathered, strict=True):
            wholes[i] = whole
    return [
        jnp.asarray(whole, shard.placement.compute)
        for whole, shard in zip(wholes, shards, strict=True)
    ]


def reduce_shards(
    placements: Sequence[Placement], gradients: Sequence[Array]
) -> list[Array]:
    """Gradients of shards from the local gradients of whole arrays, in few messages."""
    reduced = list(gradients)
    for axes, members in _by_axes(placements, lambda place: place.axes):
        sent = [gradients[i].astype(placements[i].wire) for i in members]
        dims = [placements[i].dim for i in members]
        # [..., n, ...] partial sums -> [..., n@axes, ...] each
        scattered = comm.reduce_scatter_coalesced(sent, axes, dims=dims)
        for i, gradient in zip(members, scattered, strict=True):
            reduced[i] = gradient.astype(MASTER)
    return reduced


def _by_axes(items: Sequence[Any], axes_of: Callable[[Any], tuple[str, ...]]):
    """Positions of the items that are split over the same axes."""
    found: dict[tuple[str, ...], list[int]] = {}
    for position, item in enumerate(items):
        found.setdefault(axes_of(item), []).append(position)
    return found.items()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _materialise(placement: Placement, value: Array, whole: Array | None) -> Array:
    (array,) = gather_shards([Shard(value, whole, placement)])
    return checkpoint_name(array, GATHERED)


_materialise.defvjp(
    lambda placement, value, whole: (_materialise(placement, value, whole), None),
    lambda placement, _, gradient: (reduce_shards([placement], [gradient])[0], None),
)


def variable(placement: Placement, param: Array) -> Array:
    """What the step differentiates: shaped like the leaf's column of gradients.

    Varies along every axis, so that no reduction hides in the backward pass. At stage
    2 only its shape and dtype matter: the loss reads the whole parameter.
    """
    if placement.stage == 2:
        # [..., n, ...] -> [..., n@axes, ...], nothing sent
        param = comm.shard(param, placement.axes, dim=placement.dim)
    return comm.vary(param.astype(MASTER), AXES)


def view(placement: Placement, variable: Array, param: Array) -> Array | Shard:
    """What the loss function sees of a leaf: an array, or a `Shard` to gather."""
    if placement.stage < 2:
        return variable.astype(placement.compute)
    whole = jax.lax.stop_gradient(param) if placement.stage == 2 else None
    return Shard(variable, None if whole is None else comm.vary(whole, AXES), placement)


def reduce_gradient(placement: Placement, gradient: Array) -> Array:
    """Sums over devices what the backward pass left local; once per step.

    The result is laid out like the optimizer state. Stages 2 and 3 have only the
    `replica` copies left to sum, and `tensor` for leaves that it does not split.
    """
    dtype = gradient.dtype
    gradient = gradient.astype(placement.wire)
    if placement.stage == 1:
        # [..., n, ...] partial sums -> [..., n@axes, ...]
        gradient = comm.reduce_scatter(gradient, placement.axes, dim=placement.dim)
    left = comm.varying_axes(gradient) - set(all_axes(placement.optimizer))
    gradient = comm.all_reduce(gradient, tuple(a for a in AXES if a in left))
    return gradient.astype(dtype)


def gather_updated(placement: Placement, updated: Array) -> Array:
    """The whole parameter after each device has updated its shard (stages 1 and 2)."""
    # [..., n@axes, ...] -> [..., n, ...]
    return comm.all_gather(updated, placement.axes, dim=placement.dim)


def never_saved(policy: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`policy` for `jax.checkpoint`, except that gathered weights are not kept.

    The backward pass then gathers them again (the second all-gather of stage 3). With
    no policy everything else is kept.
    """

    def saved(primitive: Any, *args: Any, **params: Any) -> Any:
        if _is_gathered(params):
            return False
        return True if policy is None else policy(primitive, *args, **params)

    return saved


def _is_gathered(params: dict[str, Any]) -> bool:
    """Whether an operation's parameters hold the body of `_materialise`.

    Differentiation shows a policy the call as one operation, and a checkpoint name
    marks only its own output, so the name is looked for inside.
    """
    bodies = (getattr(value, "jaxpr", value) for value in params.values())
    return params.get("name") == GATHERED or any(
        equation.params.get("name") == GATHERED
        for body in bodies
        for equation in getattr(body, "eqns", ())
    )
