"""One training step: local gradients inside `shard_map`, the update on shards.

The first half runs per device and moves bytes only through `comm`: ZeRO's gathers and
reductions, tensor parallelism inside the loss. The second half is the optax update on
global arrays laid out in shards. It is elementwise almost everywhere, so the compiler
finds nothing to send; where an optimizer takes a norm (clipping, LAMB) or factors a
moment, it adds the small reduction that makes the result that of unsharded arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jaxspeed import comm
from jaxspeed.mesh import AXES, BATCH_AXES
from jaxspeed.optim import Precision, loss_scale
from jaxspeed.parallel import zero
from jaxspeed.parallel.data import Loss
from jaxspeed.spec import from_axes
from jaxspeed.train.layout import Layout, shardings
from jaxspeed.train.program import Program
from jaxspeed.train.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """All that a training step is built from; its methods are the step's parts."""

    program: Program
    optimizer: optax.GradientTransformation
    layout: Layout
    mesh: Mesh
    precision: Precision
    accumulation: int

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        """The next state, and metrics as device scalars; pure and traceable."""
        scales = self.precision.scales_loss
        scale = self._loss_scale(state) if scales else jnp.ones(())
        key = jax.random.fold_in(state.random_key(), state.step)
        gradients, loss = self._gradients(state.params, batch, key, scale)
        metrics = loss.metrics
        reserved = {"loss", "grad_norm", "skipped", "loss_scale"} & set(metrics)
        if reserved:
            raise ValueError(
                f"the loss returns metrics named {sorted(reserved)}, which the engine "
                "reports itself; give them other names"
            )
        mean = loss.total / _nonzero(loss.weight)
        if scales:
            gradients = jax.tree.map(lambda g: g / scale, gradients)
        norm = optax.tree.norm(gradients)
        # A batch without a single valid target says nothing either.
        good = jnp.isfinite(norm) & jnp.isfinite(mean) & (loss.weight != 0)
        state = self._update(state, gradients, mean, good)
        metrics = metrics | {"loss": mean, "grad_norm": norm, "skipped": state.skipped}
        if scales:
            metrics["loss_scale"] = scale
        return state, metrics

    def evaluate(self, params: Any, batch: Any, key: Array) -> Loss:
        """The loss over the whole batch, without gradients."""

        def local(params: Any, batch: Any, key: Array) -> Loss:
            placements = self.layout.placements
            view = jax.tree.map(
                lambda param, place: zero.view(
                    place, zero.variable(place, param), param
                ),
                params,
                placements,
            )
            score = self.program.score or self.program.loss
            loss = all_reduced(self._loss(score, view, batch, _device_key(key)))
            return dataclasses.replace(loss, metrics=_means(loss))

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(
                self.layout.params,
                batch_specs(batch, self.mesh),
                PartitionSpec(),
            ),
            out_specs=PartitionSpec(),
        )(params, batch, key)

    def _gradients(self, params: Any, batch: Any, key: Array, scale: Array):
        return jax.shard_map(
            self._local_gradients,
            mesh=self.mesh,
            in_specs=(
                self.layout.params,
                batch_specs(batch, self.mesh),
                PartitionSpec(),
                PartitionSpec(),
            ),
            out_specs=(self.layout.optimizer, PartitionSpec()),
        )(params, batch, key, scale)

    def _local_gradients(self, params: Any, batch: Any, key: Array, scale: Array):
        """Reduced gradients, laid out like the optimizer state, and the summed loss."""
        placements = self.layout.placements
        variables = jax.tree.map(
            lambda param, place: zero.variable(place, param), params, placements
        )
        key = _device_key(key)

        def microbatch(batch: Any, key: Array) -> tuple[Any, Loss]:
            def objective(variables: Any) -> tuple[Array, Loss]:
                view = jax.tree.map(
                    lambda v, param, place: zero.view(place, v, param),
                    variables,
                    params,
                    placements,
                )
                loss = self._loss(self.program.loss, view, batch, key)
                reduced = all_reduced(loss)
                # Dividing here keeps half-precision gradients in range.
                return scale * loss.total / _nonzero(reduced.weight), reduced

            gradients, loss = jax.grad(objective, has_aux=True)(variables)
            return gradients, loss

        gradients, loss = self._accumulate(microbatch, batch, key, variables)
        gradients = jax.tree.map(
            lambda g, place: zero.reduce_gradient(place, g), gradients, placements
        )
        return gradients, dataclasses.replace(loss, metrics=_means(loss))

    def _accumulate(
        self, microbatch: Callable[..., Any], batch: Any, key: Array, variables: Any
    ) -> tuple[Any, Loss]:
        """The weighted mean of the micro-batches' gradients, and their summed loss."""
        count = self.accumulation
        if count == 1:
            return microbatch(batch, key)
        slices = jax.tree.map(
            lambda x: x.reshape(count, -1, *x.shape[1:]) if x.ndim else x, batch
        )

        def body(carry: tuple[Any, Loss], index: Array):
            gradients, loss = carry
            one = jax.tree.map(
                lambda x: (
                    lax.dynamic_index_in_dim(x, index, keepdims=False) if x.ndim else x
                ),
                slices,
            )
            new, part = microbatch(one, jax.random.fold_in(key, index))
            gradients = jax.tree.map(
                lambda total, g: total + part.weight * g, gradients, new
            )
            return (gradients, jax.tree.map(jnp.add, loss, part)), None

        first = jax.tree.map(lambda x: x[0] if x.ndim else x, slices)
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(microbatch, first, key)[1],
        )
        zeros = jax.tree.map(
            lambda v: comm.vary(jnp.zeros(v.shape, v.dtype), AXES), variables
        )
        (gradients, loss), _ = lax.scan(body, (zeros, empty), jnp.arange(count))
        weight = _nonzero(loss.weight)
        return jax.tree.map(lambda g: g / weight, gradients), loss

    def _loss(
        self, loss_of: Callable[..., Loss], view: Any, batch: Any, key: Array
    ) -> Loss:
        """The program's loss on this device, the same along `tensor`."""

        def run(view: Any, batch: Any, key: Array) -> Loss:
            return loss_of(zero.gather(view), batch, key)

        if self.program.gathers:
            loss = loss_of(view, batch, key)
        elif any(isinstance(leaf, zero.Shard) for leaf in _leaves(view)):
            loss = jax.checkpoint(run, policy=zero.never_saved())(view, batch, key)
        else:
            loss = run(view, batch, key)
        return jax.tree.map(same_off_batch, loss)

    def _loss_scale(self, state: TrainState) -> Array:
        static = self.precision.loss_scale.static
        return state.loss_scale.scale if static is None else jnp.float32(static)

    def _update(
        self, state: TrainState, gradients: Any, loss: Array, good: Array
    ) -> TrainState:
        """Applies optax to the shards, unless the step is to be skipped."""
        placed = functools.partial(self._constrain, specs=self.layout.optimizer)
        masters = placed(state.weights)
        # Optax relies on implicit promotion; a user's strict mode must not break it.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optax.with_extra_args_support(self.optimizer).update(
                placed(gradients), state.opt_state, masters, value=loss
            )
            updated = placed(optax.apply_updates(masters, updates))

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(good, new, old)

        masters = jax.tree.map(keep, updated, masters)
        opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        opt_state = self._constrain(opt_state, specs=self.layout.state.opt_state)
        return TrainState(
            step=state.step + 1,
            params=self.params_of(masters),
            master=masters if self.layout.has_master else None,
            opt_state=opt_state,
            loss_scale=loss_scale.update(
                self.precision.loss_scale, state.loss_scale, good
            )
            if self.precision.scales_loss
            else state.loss_scale,
            skipped=state.skipped + jnp.where(good, 0, 1),
            key=state.key,
        )

    def params_of(self, masters: Any) -> Any:
        """Column one of ZeRO's table from updated shards; gathered at stages 1, 2."""
        dtype = self.precision.dtype if self.layout.has_master else zero.MASTER

        def local(masters: Any) -> Any:
            return jax.tree.map(
                lambda master, place: (
                    zero.gather_updated(place, master.astype(dtype))
                    if place.stage in (1, 2)
                    else master.astype(dtype)
                ),
                masters,
                self.layout.placements,
            )

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.layout.optimizer,),
            out_specs=self.layout.params,
            check_vma=False,  # what was gathered is the same on all devices
        )(masters)

    def _constrain(self, tree: Any, *, specs: Any) -> Any:
        return lax.with_sharding_constraint(tree, shardings(specs, self.mesh))


def batch_specs(batch: Any, mesh: Mesh) -> Any:
    """The batch is split on its first dim; scalars go to every device."""
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    split = from_axes([axes])
    return jax.tree.map(lambda x: split if len(x.shape) else PartitionSpec(), batch)


def _leaves(view: Any) -> list[Any]:
    return jax.tree.leaves(view, is_leaf=lambda x: isinstance(x, zero.Shard))


def _nonzero(weight: Array) -> Array:
    return jnp.where(weight == 0, 1, weight)


def _means(loss: Loss) -> dict[str, Array]:
    """The metrics of a loss that `all_reduced` summed, as means again."""
    weight = _nonzero(loss.weight)
    return jax.tree.map(lambda value: value / weight, loss.metrics)


def _device_key(key: Array) -> Array:
    """A key of its own for every device that sees other samples."""
    return jax.random.fold_in(key, comm.axis_index(BATCH_AXES))


def same_off_batch(x: Array) -> Array:
    """`x` typed as equal along the axes that do not split the batch.

    A loss that knows nothing of `tensor` repeats itself along it; the mean of the
    copies is the loss, and gives each copy its share of the gradient.
    """
    axes = tuple(
        axis for axis in AXES if axis in comm.varying_axes(x) and axis not in BATCH_AXES
    )
    x = jnp.asarray(x, jnp.float32)
    x = comm.all_reduce(x, axes) / comm.axis_size(axes) if axes else x
    # A loss that averaged itself over the batch is one copy per device, too.
    return comm.vary(x, BATCH_AXES)


def all_reduced(loss: Loss) -> Loss:
    """The loss summed over the batch; metrics become weighted sums as well."""
    weighted = {k: v * loss.weight for k, v in loss.metrics.items()}
    parts = Loss(loss.total, loss.weight, weighted)
    return jax.tree.map(
        lambda x: comm.all_reduce(lax.stop_gradient(x), BATCH_AXES), parts
    )
