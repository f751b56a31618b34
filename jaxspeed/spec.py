"""From names of dims to partition specs: rules that refine a spec, one after another.

A parallel strategy is a rule plus the one or two collectives it needs. A `Leaf`
describes one parameter; a `Rule` takes the spec that earlier rules left and returns a
finer one. `assign` runs a chain of rules over a tree of leaves.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

Sizes = Mapping[str, int]
"""Size of every mesh axis, `mesh.shape`."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter as the rules see it.

    Attributes:
        path: its place in the tree, `layers/attention/query`.
        shape: its global shape.
        dims: a name for each dim, or None where a dim has no meaning to any rule.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ValueError(
                f"parameter {self.path!r} of shape {self.shape} names "
                f"{len(self.dims)} dims {self.dims}; give one name (or None) per dim"
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Rule = Callable[[Leaf, PartitionSpec], PartitionSpec]


def axes_of(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """The mesh axes that split dim `dim` under `spec`."""
    entry = spec[dim] if dim < len(spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def all_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that appear in `spec`, in order of dims."""
    return tuple(axis for dim in range(len(spec)) for axis in axes_of(spec, dim))


def from_axes(axes: list[tuple[str, ...]]) -> PartitionSpec:
    """A spec from one tuple of axes per dim, in its shortest form."""
    entries: list[Any] = [
        None if not names else names[0] if len(names) == 1 else names for names in axes
    ]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def split(leaf: Leaf, spec: PartitionSpec, dim: int, axes: tuple[str, ...]):
    """`spec` with dim `dim` of `leaf` split over `axes` as well.

    Raises:
        ValueError: one of the axes already splits a dim of this leaf.
    """
    taken = set(all_axes(spec)) & set(axes)
    if taken:
        raise ValueError(
            f"parameter {leaf.path!r} {leaf.shape}: dim {dim} ({leaf.dims[dim]}) would "
            f"be split over {sorted(taken)}, which already split it as {spec}; "
            "a mesh axis can split only one dim of an array"
        )
    per_dim = [axes_of(spec, d) for d in range(len(leaf.shape))]
    per_dim[dim] = per_dim[dim] + axes
    return from_axes(per_dim)


def chain(*rules: Rule) -> Rule:
    """One rule that applies `rules` in order."""

    def rule(leaf: Leaf, spec: PartitionSpec) -> PartitionSpec:
        for each in rules:
            spec = each(leaf, spec)
        return spec

    return rule


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `layers/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(shapes: Any, dims: Any = None) -> Any:
    """The tree of `Leaf` for a tree of arrays (or shapes) and their dim names.

    Args:
        shapes: a pytree whose leaves have a `shape`.
        dims: a pytree of the same structure with a tuple of names per leaf, or None:
            no dim has a name.
    """

    def leaf(path: Any, array: Any, names: tuple[str | None, ...] | None) -> Leaf:
        names = names if names is not None else (None,) * len(array.shape)
        return Leaf(path_name(path), tuple(array.shape), tuple(names))

    if dims is None:
        return jax.tree_util.tree_map_with_path(
            lambda path, array: leaf(path, array, None), shapes
        )
    return jax.tree_util.tree_map_with_path(leaf, shapes, dims)


def assign(rule: Rule, leaf_tree: Any) -> Any:
    """The tree of specs that `rule` gives, starting from nothing split."""
    return jax.tree.map(
        lambda leaf: rule(leaf, PartitionSpec()),
        leaf_tree,
        is_leaf=lambda node: isinstance(node, Leaf),
    )


def shard_shape(
    shape: tuple[int, ...], spec: PartitionSpec, sizes: Sizes
) -> tuple[int, ...]:
    """Shape of one device's shard of an array of `shape`."""
    return tuple(
        size // math.prod(sizes[axis] for axis in axes_of(spec, dim))
        for dim, size in enumerate(shape)
    )
