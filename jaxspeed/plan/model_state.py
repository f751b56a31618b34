"""The training state on one device, from shapes and rules alone.

The rules that lay out a run (`train.layout`) are asked where each leaf would lie, so
the bytes are exact: they are those of the compiled program's arguments. Nothing is
allocated, compiled or traced but the model's and the optimizer's `init`, once.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from jaxspeed import optim
from jaxspeed.config import Config
from jaxspeed.mesh import AXES
from jaxspeed.models.parameters import parameters
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.parallel import zero
from jaxspeed.spec import Leaf, Sizes, shard_shape
from jaxspeed.train.layout import Layout, make_layout

COUNTERS_BYTES = 28
"""Step, skipped steps, loss scale and random key of a `TrainState`."""


@dataclasses.dataclass(frozen=True)
class ModelState:
    """Where the state lies, and its bytes on one device.

    Attributes:
        leaves: every parameter with its row of ZeRO's table.
        params_bytes: the weights that the forward pass starts from.
        optimizer_bytes: the optimizer's state, float32 masters where there are some,
            and the counters of a run.
        has_master: float32 masters exist beside the weights.
        replicated: paths of the parameters that every device holds whole although the
            stage would split them.
    """

    leaves: tuple[tuple[Leaf, zero.Placement], ...]
    params_bytes: int
    optimizer_bytes: int
    has_master: bool
    replicated: tuple[str, ...]

    @property
    def num_params(self) -> int:
        """Number of parameters of the whole model."""
        return sum(leaf.size for leaf, _ in self.leaves)


def model_state(config: Config, sizes: Sizes) -> ModelState:
    """The state of a run on a mesh of these sizes.

    Args:
        config: model, ZeRO, precision and optimizer are read.
        sizes: size of all six mesh axes.

    Raises:
        ValueError: an axis does not divide a dim that it splits.
    """
    return _model_state(
        config.model,
        config.optimizer,
        config.zero,
        config.precision.compute,
        tuple(sizes[axis] for axis in AXES),
    )


@functools.lru_cache(maxsize=4096)
def _model_state(
    model: DecoderConfig,
    optimizer: optim.Optimizer,
    zero_config: zero.Zero,
    compute: str,
    axis_sizes: tuple[int, ...],
) -> ModelState:
    leaves, shapes, names = _parameters(model)
    built, opt_shapes = _optimizer(model, optimizer)
    mesh: Any = AbstractMesh(axis_sizes, AXES)
    layout = make_layout(
        shapes, names, built, zero_config=zero_config, compute=compute, mesh=mesh
    )
    placements = jax.tree.leaves(
        layout.placements, is_leaf=lambda x: isinstance(x, zero.Placement)
    )
    return ModelState(
        leaves=tuple(zip(jax.tree.leaves(leaves), placements, strict=True)),
        params_bytes=_bytes(shapes, layout.params, mesh.shape, _dtype(layout, compute)),
        optimizer_bytes=_bytes(opt_shapes, layout.state.opt_state, mesh.shape)
        + (_bytes(shapes, layout.optimizer, mesh.shape) if layout.has_master else 0)
        + COUNTERS_BYTES,
        has_master=layout.has_master,
        replicated=layout.replicated,
    )


@functools.lru_cache(maxsize=64)
def _parameters(model: DecoderConfig) -> tuple[Any, Any, Any]:
    """Trees of leaves, of their shapes, and of their dims' names."""
    leaves = parameters(model)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, zero.MASTER), leaves
    )
    return leaves, shapes, jax.tree.map(lambda leaf: leaf.dims, leaves)


@functools.lru_cache(maxsize=64)
def _optimizer(model: DecoderConfig, optimizer: optim.Optimizer) -> tuple[Any, Any]:
    """The optax optimizer, and the shapes of its state."""
    leaves, shapes, _ = _parameters(model)
    # The number of steps moves the learning rate, not the state.
    built = optim.build(optimizer, 1, leaves=leaves)
    with jax.numpy_dtype_promotion("standard"):  # as in the step
        return built, jax.eval_shape(built.init, shapes)


def _dtype(layout: Layout, compute: str) -> Any:
    return compute if layout.has_master else zero.MASTER


def _bytes(shapes: Any, specs: Any, sizes: Mapping[str, int], dtype: Any = None) -> int:
    """Bytes of one device's shards; `dtype` in place of the arrays' own."""
    arrays = jax.tree.leaves(shapes)
    placed = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return sum(
        math.prod(shard_shape(array.shape, spec, sizes))
        * jax.numpy.dtype(dtype or array.dtype).itemsize
        for array, spec in zip(arrays, placed, strict=True)
    )
