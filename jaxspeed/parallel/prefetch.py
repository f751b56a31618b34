"""A scan over layers that hides ZeRO's communication under its compute.

ZeRO-Infinity's overlap (Rajbhandari et al., 2021, section 6.2) as a software pipeline:
while layer i computes, the weights of layer i + 1 are on their way, and in the backward
pass also the gradients of the layer before. Nothing in an iteration waits for what that
iteration sends, so a compiler can start each transfer early and finish it late.

    forward     gather 0 | gather i+1, compute i | ... | compute L-1
    backward    gather L-2, differentiate L-1
                | gather i-1, scatter gradient i+1, differentiate i | ...
                | scatter gradient 1, differentiate 0 | scatter gradient 0

The last layer's weights stay for the backward pass, which starts with them, so a step
gathers each other layer twice and the last one once. At most two layers and the
gradients of two are whole at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxspeed import comm
from jaxspeed.mesh import AXES
from jaxspeed.parallel.zero import (
    Shard,
    gather_shards,
    never_saved,
    reduce_shards,
)

Block = Callable[[Any, Array, Any, Any], Array]


def scan_layers(
    block: Block,
    x: Array,
    layers: Any,
    *,
    shared: Any = None,
    per_layer: Any = None,
    policy: Callable[..., Any] | None = None,
) -> Array:
    """`x` after every layer in turn.

    Args:
        block: (layer, x, shared, per_layer) -> x, of the shape and dtype of `x`. It may
            not close over arrays that are differentiated.
        x: the activations before the first layer.
        layers: a pytree whose leaves are stacked on a leading dim of L layers: arrays,
            or the `zero.Shard` of one, which `block` sees whole.
        shared: arrays that every layer sees; they get no gradient.
        per_layer: arrays with a leading dim L; they get no gradient.
        policy: what a layer keeps for its backward pass, as for `jax.checkpoint`; None
            keeps all but the weights.
    """
    leaves, structure = jax.tree.flatten(layers, is_leaf=_is_shard)
    if policy is None:
        policy = jax.checkpoint_policies.everything_saveable

    def on_leaves(weights: list[Array], x: Array, shared: Any, own: Any) -> Array:
        return block(jax.tree.unflatten(structure, weights), x, shared, own)

    layer = jax.checkpoint(on_leaves, policy=never_saved(policy))
    if not any(map(_is_shard, leaves)):
        body = lambda x, xs: (layer(xs[0], x, shared, xs[1]), None)  # noqa: E731
        return lax.scan(body, x, (leaves, per_layer))[0]
    return _Pipeline(layer, tuple(leaves)).run(x, (shared, per_layer))


def _is_shard(leaf: Any) -> bool:
    return isinstance(leaf, Shard)


def _at(tree: Any, index: Any) -> Any:
    """Layer `index` of stacked arrays."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
    )


def _cast_late(value: Array) -> Array:
    """`value`, such that a cast of it stays where it is.

    A compiler would rather cast the stack of all layers' shards once, before the loop,
    and so keep a second copy of them. Integers it cannot cast.
    """
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), value.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a layer's backward pass needs, without its weights and the caller's arrays.

    Attributes:
        saved: activations.
        given: for each leaf of the pullback, which argument it is, or None if saved.
        structure: of the pullback.
    """

    saved: list[Array]
    given: tuple[int | None, ...] = dataclasses.field(metadata=dict(static=True))
    structure: Any = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, pullback: Any, arguments: list[Array]) -> "_Kept":
        """Drops the leaves of `pullback` that are themselves arguments."""
        leaves, structure = jax.tree.flatten(pullback)
        number = {id(argument): i for i, argument in enumerate(arguments)}
        given = tuple(number.get(id(leaf)) for leaf in leaves)
        saved = [leaf for leaf, at in zip(leaves, given, strict=True) if at is None]
        return cls(saved, given, structure)

    def pullback(self, arguments: list[Array]) -> Any:
        """The pullback, given the arguments again."""
        saved = iter(self.saved)
        leaves = [next(saved) if at is None else arguments[at] for at in self.given]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pipeline:
    """The scan for leaves of which some are shards."""

    layer: Callable[[list[Array], Array, Any, Any], Array]
    leaves: tuple[Any, ...]

    @property
    def _shards(self) -> list[tuple[int, Shard]]:
        return [(i, leaf) for i, leaf in enumerate(self.leaves) if _is_shard(leaf)]

    @property
    def depth(self) -> int:
        return jax.tree.leaves(self.leaves[0])[0].shape[0]

    def run(self, x: Array, fixed: tuple[Any, Any]) -> Array:
        """The layers in turn, with a backward pass of its own."""
        values = [leaf.value if _is_shard(leaf) else leaf for leaf in self.leaves]
        wholes = [leaf.whole if _is_shard(leaf) else None for leaf in self.leaves]

        @jax.custom_vjp
        def apply(x: Array, values: Any, wholes: Any, fixed: Any) -> Array:
            return self._forward(x, values, wholes, fixed)[0]

        apply.defvjp(self._forward, self._backward)
        return apply(x, values, wholes, fixed)

    def _fetch(self, values: Any, wholes: Any, index: Any) -> list[Array]:
        """The weights of one layer, whole."""
        weights = list(_at(values, index))
        shards = [
            dataclasses.replace(
                leaf, value=_cast_late(weights[i]), whole=_at(wholes[i], index)
            )
            for i, leaf in self._shards
        ]
        for (i, _), whole in zip(self._shards, gather_shards(shards), strict=True):
            weights[i] = whole
        return weights

    def _store(self, total: Any, index: Any, gradients: list[Array]) -> list[Array]:
        """`total` with one layer's gradients, reduced to shards, in their place."""
        gradients = list(gradients)
        placements = [leaf.placement for _, leaf in self._shards]
        local = [gradients[i] for i, _ in self._shards]
        reduced = reduce_shards(placements, local)
        for (i, _), gradient in zip(self._shards, reduced, strict=True):
            gradients[i] = gradient
        return [
            lax.dynamic_update_index_in_dim(buffer, gradient, index, 0)
            for buffer, gradient in zip(total, gradients, strict=True)
        ]

    def _forward(self, x: Array, values: Any, wholes: Any, fixed: Any):
        shared, per_layer = fixed
        last = self.depth - 1

        def compute(weights: list[Array], x: Array, index: Any):
            own = _at(per_layer, index)
            function = lambda w, x: self.layer(w, x, shared, own)  # noqa: E731
            y, pullback = jax.vjp(function, weights, x)
            arguments = [*weights, *jax.tree.leaves((shared, own))]
            return y, _Kept.of(pullback, arguments)

        def body(carry: Any, index: Array):
            x, weights = carry
            following = self._fetch(values, wholes, index + 1)
            x, kept = compute(weights, x, index)
            return (x, following), kept

        carry = (x, self._fetch(values, wholes, 0))
        (x, weights), kept = lax.scan(body, carry, jnp.arange(last))
        x, kept_last = compute(weights, x, last)
        return x, (values, wholes, fixed, kept, kept_last, weights)

    def _backward(self, residuals: Any, dx: Array):
        values, wholes, fixed, kept, kept_last, weights = residuals
        (shared, per_layer), last = fixed, self.depth - 1

        def differentiate(kept: _Kept, weights: list[Array], index: Any, dx: Array):
            own = _at(per_layer, index)
            arguments = [*weights, *jax.tree.leaves((shared, own))]
            return kept.pullback(arguments)(dx)

        def body(carry: Any, index: Array):
            dx, weights, pending, total = carry
            following = self._fetch(values, wholes, index - 1)
            total = self._store(total, index + 1, pending)
            pending, dx = differentiate(_at(kept, index), weights, index, dx)
            return (dx, following, pending, total), None

        total = [comm.vary(jnp.zeros(v.shape, v.dtype), AXES) for v in values]
        if last == 0:
            pending, dx = differentiate(kept_last, weights, 0, dx)
        else:
            following = self._fetch(values, wholes, last - 1)
            pending, dx = differentiate(kept_last, weights, last, dx)
            carry = (dx, following, pending, total)
            carry, _ = lax.scan(body, carry, jnp.arange(last - 1, 0, -1))
            dx, weights, pending, total = carry
            total = self._store(total, 1, pending)
            pending, dx = differentiate(_at(kept, 0), weights, 0, dx)
        total = self._store(total, 0, pending)
        return dx, total, None, None
