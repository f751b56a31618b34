"""Where every part of the training state lives: the rules applied to whole trees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspeed import spec
from jaxspeed.optim.loss_scale import LossScaleState
from jaxspeed.parallel import tensor, zero
from jaxspeed.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Layout:
    """Placements of the parameters, and the specs of a whole `TrainState`.

    Attributes:
        placements: a `zero.Placement` per parameter.
        state: a `PartitionSpec` per leaf of the state.
        has_master: float32 masters exist beside the parameters.
        replicated: paths of the parameters that every device holds whole although the
            stage would split them: too small, or no dim divides.
    """

    placements: Any
    state: TrainState
    has_master: bool
    replicated: tuple[str, ...]

    @property
    def params(self) -> Any:
        """Column one of ZeRO's table, a spec per parameter."""
        return _map_placements(lambda place: place.params, self.placements)

    @property
    def optimizer(self) -> Any:
        """Column three: masters, optimizer state and reduced gradients."""
        return _map_placements(lambda place: place.optimizer, self.placements)


def _map_placements(function: Any, placements: Any) -> Any:
    return jax.tree.map(
        function, placements, is_leaf=lambda x: isinstance(x, zero.Placement)
    )


def make_layout(
    shapes: Any,
    dims: Any,
    optimizer: optax.GradientTransformation,
    *,
    zero_config: zero.Zero,
    compute: Any,
    mesh: Mesh,
) -> Layout:
    """Applies the rules of tensor parallelism and ZeRO to every parameter.

    Args:
        shapes: tree of parameter shapes.
        dims: tree of tuples of dim names, or None.
        optimizer: its state is laid out like the parameters it belongs to.
        zero_config: which row of the table.
        compute: the dtype of the forward pass.
        mesh: all six axes.
    """
    sizes = mesh.shape
    leaves = spec.leaves(shapes, dims)
    others = tensor.rule(sizes)

    def place(leaf: spec.Leaf) -> zero.Placement:
        whole = others(leaf, PartitionSpec())
        return zero.place(zero_config, leaf, whole, sizes=sizes, compute=compute)

    placements = jax.tree.map(
        place, leaves, is_leaf=lambda node: isinstance(node, spec.Leaf)
    )
    has_master = zero_config.stage in (1, 2) and jnp.dtype(compute) != zero.MASTER
    flat = jax.tree_util.tree_leaves_with_path(
        placements, is_leaf=lambda x: isinstance(x, zero.Placement)
    )
    splits = any(sizes[axis] > 1 for axis in zero_config.axes)
    replicated = tuple(
        spec.path_name(path)
        for path, placement in flat
        if zero_config.stage > 0 and splits and placement.shard == placement.whole
    )
    optimizer_specs = _map_placements(lambda place: place.optimizer, placements)
    params_specs = _map_placements(lambda place: place.params, placements)
    scalar: Any = PartitionSpec()
    state = TrainState(
        step=scalar,
        params=params_specs,
        master=optimizer_specs if has_master else None,
        opt_state=_optimizer_specs(optimizer, shapes, dict(flat), zero_config, sizes),
        loss_scale=LossScaleState(scalar, scalar, scalar),
        skipped=scalar,
        key=scalar,
    )
    return Layout(placements, state, has_master, replicated)


def _optimizer_specs(
    optimizer: optax.GradientTransformation,
    shapes: Any,
    placements: dict[Any, zero.Placement],
    zero_config: zero.Zero,
    sizes: spec.Sizes,
) -> Any:
    """Specs of the optax state: a leaf lies where the parameter it mirrors lies.

    Optax keeps moments in trees shaped like the parameters, so the path of a moment
    ends with the path of its parameter. Leaves of any other shape (factored moments,
    say) are split by ZeRO's rule on their own.
    """
    shape_of = {
        path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    rule = zero.rule(zero_config, sizes)

    def place(path: Any, leaf: Any) -> PartitionSpec:
        for start in range(len(path) + 1):
            owner = path[start:]
            if shape_of.get(owner) == leaf.shape:
                return placements[owner].optimizer
        if zero_config.stage == 0:
            return PartitionSpec()
        unnamed = (None,) * len(leaf.shape)
        own = spec.Leaf(spec.path_name(path), tuple(leaf.shape), unnamed)
        return rule(own, PartitionSpec())

    masters = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, zero.MASTER), shapes
    )
    state = jax.eval_shape(optimizer.init, masters)
    return jax.tree_util.tree_map_with_path(place, state)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """The tree of `NamedSharding` for a tree of specs."""
    return jax.tree.map(
        lambda each: NamedSharding(mesh, each),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
