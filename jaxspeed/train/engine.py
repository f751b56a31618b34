"""`initialize`: a user's model, loss and optax optimizer become an engine.

The engine is a frozen record of functions over a `TrainState`; it has no state of its
own. Every function is one compiled program over the mesh.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxspeed import optim, spec
from jaxspeed.checkpoint import Store, open_store
from jaxspeed.config import Config
from jaxspeed.mesh import AXES, BATCH_AXES, make_mesh, settle
from jaxspeed.optim import loss_scale
from jaxspeed.parallel import zero
from jaxspeed.parallel.data import Loss
from jaxspeed.train.compiler import compiler_options
from jaxspeed.train.layout import Layout, make_layout, shardings
from jaxspeed.train.program import Program, from_function, from_nnx
from jaxspeed.train.state import TrainState
from jaxspeed.train.step import Step, batch_specs


@dataclasses.dataclass(frozen=True)
class Engine:
    """What `initialize` returns.

    Attributes:
        init: (key, params=None) -> state, created in shards, or around parameters that
            exist. Call it once at the start of a run.
        step: (state, batch) -> (state, metrics). The old state's buffers are reused;
            metrics are device scalars (`loss`, `grad_norm`, `skipped`, the loss's own),
            so nothing waits until they are read (but on simulated devices: `settle`).
        evaluate: (state, batch) -> Loss, summed over the whole batch on all devices.
        params: (state) -> float32 parameters, whatever the precision.
        save: (state, notes=None) -> None, in the background; `notes` is any JSON.
        restore: (step=None) -> (state, notes), the latest step by default. A checkpoint
            that holds parameters alone gives a fresh state around them.
        steps: () -> the steps that can be restored.
        wait: () -> None, returns when all saves are committed.
        lower: (batch) -> the lowered training step, for arrays or shapes; nothing is
            allocated, so it works for machines that are not there.
        mesh: the device mesh.
        layout: where every part of the state lives.
        config: as given.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[[TrainState, Any], Loss]
    params: Callable[[TrainState], Any]
    save: Callable[..., None]
    restore: Callable[..., tuple[TrainState, dict[str, Any]]]
    steps: Callable[[], list[int]]
    wait: Callable[[], None]
    lower: Callable[[Any], Any]
    mesh: Mesh
    layout: Layout
    config: Config


def initialize(
    config: Config,
    model: Any,
    optimizer: optax.GradientTransformation | None = None,
    *,
    params: Any = None,
    loss: Callable[[Any, Any, Array], Any] | None = None,
    mesh: Mesh | None = None,
) -> Engine:
    """Makes an engine that trains `model` over the mesh.

    Args:
        config: mesh, ZeRO stage, precision, batch and checkpoint are read.
        model: one of
            an nnx module, or a function from `nnx.Rngs` to one (its parameters are
            then created in shards, never whole on one device);
            a loss function (params, batch, key), with `params`;
            a `Program`, for linen modules and for losses that name their dims.
        optimizer: any optax optimizer, unchanged; `config.optimizer` by default.
        params: initial parameters of a loss function, or a function key -> params.
        loss: loss(model, batch, key) for an nnx module; `model.loss` by default.
        mesh: a mesh made before; from `config.mesh` and all devices by default.

    Raises:
        ValueError: the configuration does not fit the devices or the model.
        TypeError: `model` is none of the above.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config is a {type(config).__name__}; give a js.Config, or make one of a "
            "ds_config.json with jaxspeed.ds_config.to_config"
        )
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    _check_axes(mesh)
    program = _program(model, params, loss)
    shapes = program.shapes()
    if optimizer is None:
        leaves = spec.leaves(shapes, program.dims)
        optimizer = optim.build(config.optimizer, config.run.steps, leaves=leaves)
    layout = make_layout(
        shapes,
        program.dims,
        optimizer,
        zero_config=config.zero,
        compute=config.precision.dtype,
        mesh=mesh,
    )
    step = Step(
        program, optimizer, layout, mesh, config.precision, config.batch.accumulation
    )
    return _engine(config, step, shapes)


def _check_axes(mesh: Mesh) -> None:
    if mesh.axis_names != AXES:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}; it needs all of {AXES}, unused ones "
            "of size 1: make it with js.make_mesh"
        )
    for axis in ("pipe", "seq"):
        if mesh.shape[axis] > 1:
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]}: splitting over {axis!r} is not "
                "built yet; use size 1 and put the devices on data, replica or tensor"
            )


def _program(model: Any, params: Any, loss: Any) -> Program:
    if isinstance(model, Program):
        return model
    if isinstance(model, linen.Module):
        raise TypeError(
            "a linen module needs inputs to create its parameters: pass "
            "js.train.from_linen(module, loss, example_inputs)"
        )
    if params is not None:
        if isinstance(model, nnx.Module):
            raise TypeError(
                "an nnx module brings its own parameters; leave out params=, or pass "
                "them to engine.init(key, params)"
            )
        return from_function(model, params)
    if isinstance(model, nnx.Module) or callable(model):
        _check_maker(model)
        return from_nnx(cast(Any, model), loss)
    raise TypeError(
        f"cannot train a {type(model).__name__}; give an nnx module, a function that "
        "makes one, a loss function with params=, or a js.train.Program"
    )


def _check_maker(model: Any) -> None:
    """A loss function without its parameters is the likeliest mistake here."""
    if isinstance(model, nnx.Module):
        return
    required = [
        parameter.name
        for parameter in inspect.signature(model).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise TypeError(
            f"{getattr(model, '__name__', model)!r} takes {required}; a loss function "
            "needs its parameters as well (params=...), and a function that makes an "
            "nnx module takes only rngs"
        )


def _engine(config: Config, step: Step, shapes: Any) -> Engine:
    """Compiles the parts of `step` and binds them to places on the mesh."""
    mesh, layout = step.mesh, step.layout
    places = shardings(layout.state, mesh)
    like = jax.eval_shape(lambda: _create(step, jax.random.key(0)))
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        like,
        places,
    )
    create = jax.jit(lambda key: _create(step, key), out_shardings=places)
    adopt = jax.jit(lambda params, key: _adopt(step, params, key), out_shardings=places)
    train = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(places, None),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )
    evaluate = jax.jit(step.evaluate)

    def init(key: Array, params: Any = None) -> TrainState:
        given = step.program.values if params is None else params
        if given is None:
            return settle(create(key), mesh)
        _check_shapes(given, shapes)
        first = shardings(layout.optimizer, mesh)
        return settle(adopt(jax.tree.map(_put, given, first), key), mesh)

    def run(state: TrainState, batch: Any):
        _check_alive(state)
        placed = place_batch(batch, mesh, config.batch.accumulation)
        return settle(train(state, placed), mesh)

    def score(state: TrainState, batch: Any) -> Loss:
        _check_alive(state)
        key = state.random_key()
        placed = place_batch(batch, mesh, 1)
        return settle(evaluate(state.params, placed, key), mesh)

    def lower(batch: Any) -> Any:
        batch = jax.tree.map(_shaped, batch)
        specs = shardings(batch_specs(batch, mesh), mesh)
        shapes = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            batch,
            specs,
        )
        return train.lower(abstract, shapes)

    stored = _storage(config, step, abstract, init)
    return Engine(
        init=init,
        step=run,
        evaluate=score,
        params=lambda state: state.weights,
        lower=lower,
        mesh=mesh,
        layout=layout,
        config=config,
        **stored,
    )


def _create(step: Step, key: Array) -> TrainState:
    init_key, run_key = jax.random.split(key)
    return _adopt(step, step.program.init(init_key), run_key)


def _adopt(step: Step, params: Any, key: Array) -> TrainState:
    """The state at step 0 with these parameters."""
    masters = jax.tree.map(lambda p: p.astype(zero.MASTER), params)
    masters = jax.lax.with_sharding_constraint(
        masters, shardings(step.layout.optimizer, step.mesh)
    )
    with jax.numpy_dtype_promotion("standard"):  # as in the step
        opt_state = step.optimizer.init(masters)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=step.params_of(masters),
        master=masters if step.layout.has_master else None,
        opt_state=opt_state,
        loss_scale=loss_scale.init(step.precision.loss_scale),
        skipped=jnp.zeros((), jnp.int32),
        key=jax.random.bits(key, (2,), jnp.uint32),  # whatever generator `key` is of
    )


def _check_alive(state: TrainState) -> None:
    if state.step.is_deleted():
        raise ValueError(
            "this state's buffers were reused by engine.step; go on with the state "
            "that engine.step returned"
        )


def _check_shapes(params: Any, shapes: Any) -> None:
    """Parameters to start from must be those of the model."""
    given = {
        spec.path_name(path): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    wanted = {
        spec.path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise ValueError(
                f"parameter {name!r}: the model has shape {wanted.get(name)}, given is "
                f"{given.get(name)} (None: not there)"
            )


def _put(value: Any, place: NamedSharding) -> Array:
    """One array onto the mesh; a host array is read only where a device needs it."""
    if isinstance(value, jax.Array):
        return value if value.sharding == place else jax.device_put(value, place)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def place_batch(batch: Any, mesh: Mesh, accumulation: int) -> Any:
    """A batch onto the mesh, its first dim split over replica, data and expert.

    Args:
        batch: pytree of host arrays, the same global batch in every process (each
            copies only its devices' rows), or of global `jax.Array`s.
        mesh: the mesh.
        accumulation: micro-batches that each device's rows are cut into.

    Raises:
        ValueError: the rows do not divide over devices and micro-batches.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        rows = np.shape(leaf)[:1]
        if rows and (rows[0] == 0 or rows[0] % (shards * accumulation)):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {rows[0]} rows; they must "
                f"divide by {shards} (mesh replica x data x expert) times "
                f"{accumulation} (batch.accumulation): use a multiple of "
                f"{shards * accumulation}"
            )
    places = shardings(batch_specs(jax.tree.map(_shaped, batch), mesh), mesh)
    return jax.tree.map(_put, batch, places)


def _shaped(x: Any) -> Any:
    return x if hasattr(x, "shape") else np.asarray(x)


def _storage(
    config: Config,
    step: Step,
    abstract: TrainState,
    init: Callable[..., TrainState],
) -> dict[str, Any]:
    """The engine's functions over the checkpoint folder, opened at first use.

    A checkpoint holds float32 parameters once, whichever of the table's columns the
    stage keeps them in, so every stage and precision can load every other's.
    """
    opened: list[Store] = []

    def store() -> Store:
        if not opened:
            opened.append(open_store(config.checkpoint))
        return opened[0]

    def parts_of(state: TrainState) -> dict[str, Any]:
        rest = dataclasses.replace(state, params=None, master=None)
        return {"params": state.weights, "rest": rest}

    @jax.jit
    def join(masters: Any, rest: TrainState) -> TrainState:
        kept = masters if step.layout.has_master else None
        params = step.params_of(masters) if step.layout.has_master else masters
        return dataclasses.replace(rest, params=params, master=kept)

    def save(state: TrainState, notes: dict[str, Any] | None = None) -> None:
        _check_alive(state)
        store().save(int(state.step), parts_of(state), notes)

    def restore(number: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        steps = store().steps()
        if number is None and not steps:
            raise FileNotFoundError(
                f"no checkpoint in {config.checkpoint.directory} to restore"
            )
        number = steps[-1] if number is None else number
        like = parts_of(abstract)
        if number in steps and "rest" not in store().parts(number):
            like.pop("rest")
        parts, notes = store().restore(number, like)
        if "rest" not in parts:  # converted weights: a run starts from them
            return init(jax.random.key(config.run.seed), parts["params"]), notes
        return settle(join(parts["params"], parts["rest"]), step.mesh), notes

    return dict(
        save=save,
        restore=restore,
        steps=lambda: store().steps(),
        wait=lambda: store().wait(),
    )
