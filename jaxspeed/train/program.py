"""What the engine trains, in one form: nnx modules, linen modules, plain functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array

from jaxspeed.models.dims import dims, is_variable
from jaxspeed.parallel.data import Loss, as_loss
from jaxspeed.spec import path_name


@dataclasses.dataclass(frozen=True)
class Program:
    """A pytree of parameters and a loss.

    Attributes:
        loss: (params, batch, key) -> Loss. `batch` and `params` are this device's
            shards; the mean over all devices is taken outside.
        init: key -> params; traced, so that parameters are created in shards.
        values: parameters that exist already, or None to call `init`.
        dims: a name (or None) for each dim of each parameter, as a tree of tuples; only
            a loss written with `parallel.tensor` should name dims that `tensor` splits.
            None: no dim has a name.
        gathers: the loss calls `js.gather` where it uses weights. Otherwise the engine
            gathers all of them before the loss, and again in the backward pass.
        score: the loss for evaluation (without dropout, say); None is `loss`.
    """

    loss: Callable[[Any, Any, Array], Loss]
    init: Callable[[Array], Any]
    values: Any = None
    dims: Any = None
    gathers: bool = False
    score: Callable[[Any, Any, Array], Loss] | None = None

    def shapes(self) -> Any:
        """The tree of parameter shapes and dtypes.

        Raises:
            TypeError: a parameter is not a floating-point array.
        """
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"parameter {path_name(path)!r} has dtype {leaf.dtype}; parameters "
                    "must be floating point, keep other arrays out of them"
                )
        return shapes


def from_function(
    loss: Callable[[Any, Any, Array], Any],
    params: Any,
    *,
    dims: Any = None,
    gathers: bool = False,
) -> Program:
    """A program from `loss(params, batch, key)` and parameters.

    Args:
        loss: returns a scalar mean, (scalar, dict of metrics), or a `js.Loss`.
        params: a pytree of arrays, or a function key -> params that creates them
            (in shards: no device ever holds all of them).
        dims: see `Program`.
        gathers: see `Program`.
    """

    def wrapped(params: Any, batch: Any, key: Array) -> Loss:
        return as_loss(loss(params, batch, key))

    if callable(params):
        return Program(wrapped, params, dims=dims, gathers=gathers)

    def given(key: Array) -> Any:
        return jax.tree.map(jnp.asarray, params)

    return Program(wrapped, given, params, dims, gathers)


def from_nnx(
    model: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    loss: Callable[[Any, Any, Array], Any] | None = None,
) -> Program:
    """A program from a flax nnx module.

    Args:
        model: a module, or a function from `nnx.Rngs` to one, which creates the
            parameters in shards.
        loss: loss(model, batch, key); `model.loss(batch, key)` by default.

    Raises:
        TypeError: there is no loss, or the function does not make a module.
        ValueError: the module carries batch statistics, or a function makes a module
            with other variables than parameters and random streams.
    """
    values = None
    if isinstance(model, nnx.Module):
        make: Callable[[nnx.Rngs], nnx.Module] = lambda rngs: model  # noqa: E731
        values = _pure(nnx.state(model, nnx.Param))
    else:
        make = model
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0))))
    if not isinstance(abstract, nnx.Module):
        raise TypeError(
            f"{model!r} made a {type(abstract).__name__}, not an nnx.Module; to train "
            "a plain loss function give its parameters as well: params=..."
        )
    if loss is None and not hasattr(abstract, "loss"):
        raise TypeError(
            f"{type(abstract).__name__} has no method loss(batch, key); give "
            "loss=lambda model, batch, key: ..."
        )
    if jax.tree.leaves(nnx.state(abstract, nnx.BatchStat)):
        raise ValueError(
            f"{type(abstract).__name__} has BatchStat variables (batch norm); they "
            "would differ between devices. Use layer, group or RMS norm"
        )
    frozen = nnx.state(abstract, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
    if values is None and jax.tree.leaves(frozen):
        raise ValueError(
            f"{type(abstract).__name__} has variables that are neither parameters nor "
            f"random streams: {list(nnx.to_flat_state(frozen).paths)}; give the module "
            "itself, whose variables stay as they are, or make them nnx.Param"
        )
    variables = nnx.state(abstract, nnx.Param)

    def run(params: Any, batch: Any, key: Array) -> Loss:
        return loss_of(merge(params, key), batch, key)

    def score(params: Any, batch: Any, key: Array) -> Loss:
        module = merge(params, key)
        module.eval()
        return loss_of(module, batch, key)

    def loss_of(module: Any, batch: Any, key: Array) -> Loss:
        return as_loss(
            module.loss(batch, key) if loss is None else loss(module, batch, key)
        )

    def merge(params: Any, key: Array) -> Any:
        graph, _, rest = nnx.split(abstract, nnx.Param, ...)
        if jax.tree.leaves(rest):  # random streams and the like have values
            source = model if values is not None else make(nnx.Rngs(key))
            rest = _reseed(nnx.split(source, nnx.Param, ...)[2], key)
        state = jax.tree.map(
            lambda old, new: old.replace(new),
            variables,
            nnx.State(params),
            is_leaf=is_variable,
        )
        return nnx.merge(graph, state, rest)

    return Program(
        run,
        lambda key: _pure(nnx.state(make(nnx.Rngs(key)), nnx.Param)),
        values,
        _dims(variables),
        bool(getattr(abstract, "gathers", False)),
        score,
    )


def from_linen(
    module: linen.Module, loss: Callable[[Any, Any, Array], Any], example: tuple
) -> Program:
    """A program from a flax linen module.

    Args:
        module: the module; only its "params" collection is trained.
        loss: loss(apply, batch, key), where `apply(*inputs)` runs the module.
        example: inputs (arrays or `jax.ShapeDtypeStruct`) to initialise it with.
    """

    def init(key: Array) -> Any:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        return linen.meta.unbox(module.init(key, *inputs)["params"])

    def run(params: Any, batch: Any, key: Array) -> Loss:
        apply = functools.partial(module.apply, {"params": params})
        return as_loss(loss(apply, batch, key))

    return Program(run, init)


def _reseed(state: Any, key: Array) -> Any:
    """Variables for this trace: each random stream restarts from its own key."""
    keys = iter(range(len(jax.tree.leaves(state, is_leaf=is_variable))))

    def fresh(variable: Any) -> Any:
        value = variable.get_value()
        if isinstance(variable, nnx.RngKey):
            own = jax.random.fold_in(key, next(keys))
            value = jax.random.split(own, value.shape) if value.shape else own
        elif isinstance(variable, nnx.RngCount):
            value = jnp.zeros_like(value)
        return variable.replace(value)

    return jax.tree.map(fresh, state, is_leaf=is_variable)


def _pure(state: Any) -> Any:
    return nnx.to_pure_dict(state)


def _dims(variables: Any) -> Any:
    """Names of dims, as a tree of tuples."""
    named = jax.tree.map(lambda v: v.replace(dims(v)), variables, is_leaf=is_variable)
    return _pure(named)
