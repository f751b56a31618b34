"""Optimizers by name, each a chain of optax pieces: clip, direction, decay, rate.

The update is written for whole arrays; where state is sharded, the compiler runs it
on the shards. Leaves may stack the layers of a model along a dim named `layers`; what
an algorithm does per matrix (LAMB's trust ratio, Muon's orthogonalization, sparing
norms from decay) is then done per layer; only Adafactor's root mean squares are taken
over the whole leaf. Papers, on arXiv: Adam 1412.6980, AdamW 1711.05101, LAMB
1904.00962, Lion 2302.06675, Adafactor 1804.04235; Adagrad is Duchi et al., 2011.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxspeed import spec
from jaxspeed.optim.matrices import is_matrix, map_leaves, own_dims
from jaxspeed.optim.muon import scale_by_muon_and_adam
from jaxspeed.optim.schedules import Schedule, build_schedule, momentum_schedule
from jaxspeed.spec import Leaf

Name = Literal["adam", "adamw", "adagrad", "lamb", "lion", "sgd", "muon", "adafactor"]
Decay = Literal["matrices", "all"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule and its numbers.

    Attributes:
        name: `adam` and `adagrad` and `sgd` add weight decay to the gradient (L2);
            the others decay the weights themselves.
        learning_rate: the schedule's peak. Adafactor's is relative to each leaf's root
            mean square.
        betas: of adam, adamw, lamb, lion, and of the leaves Muon leaves to Adam.
        epsilon: the guard in their denominators, and in adagrad's.
        bias_correction: whether adam, adamw and lamb undo the moments' start at zero.
        weight_decay: times the learning rate, except where it is L2.
        momentum: of sgd (0 is none) and muon.
        clip_norm: gradients are scaled down to this global norm; None does not clip.
        decay: which leaves weight decay acts on: `matrices` (see `is_matrix`), or
            `all`, norms and biases too.
        trust_ratio: bounds on LAMB's ratio of norms, weight to update.
        adam_learning_rate: for muon, the peak of the leaves left to Adam (embeddings
            and all that is no matrix); Muon's own updates are then scaled by
            √max(1, fan_out/fan_in). None is one rate for both, with Muon's updates
            scaled to Adam's root mean square, 0.2·√max(fan_in, fan_out).
        schedule: how the learning rate moves.
    """

    name: Name = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    bias_correction: bool = True
    weight_decay: float = 0.1
    momentum: float = 0.9
    clip_norm: float | None = 1.0
    decay: Decay = "matrices"
    trust_ratio: tuple[float, float] = (0.01, 10.0)
    adam_learning_rate: float | None = None
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        for name, allowed in (("name", Name), ("decay", Decay)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(
                    f"optimizer.{name} is {value!r}; it must be one of "
                    f"{', '.join(get_args(allowed))}"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optimizer.betas is {self.betas}; give two numbers, each at least 0 "
                "and below 1"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"optimizer.momentum is {self.momentum}; it must be at least 0 and "
                "below 1"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"optimizer.clip_norm is {self.clip_norm}; give a positive norm, or "
                "None not to clip"
            )
        for name in ("learning_rate", "adam_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"optimizer.{name} is {value}; it must be positive")
        for name in ("epsilon", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be 0 or more"
                )
        if not 0 <= self.trust_ratio[0] <= self.trust_ratio[1]:
            raise ValueError(
                f"optimizer.trust_ratio is {self.trust_ratio}; give a lower and an "
                "upper bound, neither negative"
            )
        cycles = momentum_schedule(self.schedule) is not None
        if cycles and self.name not in ("adam", "adamw", "lamb", "lion", "sgd"):
            raise ValueError(
                f"OneCycle moves the momentum, which {self.name} does not take from "
                "outside; set optimizer.schedule.one_cycle.cycle_momentum to False, or "
                "use adam, adamw, lamb, lion or sgd"
            )


def learning_rate(optimizer: Optimizer, total_steps: int) -> optax.Schedule:
    """The learning rate by number of updates made, for metrics; see `build_schedule`.

    Args:
        optimizer: its learning rate and schedule.
        total_steps: updates in the run.
    """
    return build_schedule(optimizer.schedule, optimizer.learning_rate, total_steps)


def build(
    optimizer: Optimizer, total_steps: int, *, leaves: Any = None
) -> optax.GradientTransformation:
    """The optax transformation for `optimizer`; its `update` needs the params.

    Args:
        optimizer: the rule and its numbers.
        total_steps: updates in the run, where the schedule ends.
        leaves: a pytree like the params of `spec.Leaf`, which name the dims; None
            where dims have no names, and then no leaf stacks layers.
    """
    decay = optax.add_decayed_weights(
        optimizer.weight_decay,
        mask=None
        if optimizer.decay == "all"
        else lambda params: map_leaves(lambda _, leaf: is_matrix(leaf), params, leaves),
    )
    direction = _direction(optimizer, leaves)
    parts = [direction, decay]
    if optimizer.name in ("adam", "adagrad", "sgd"):
        parts = [decay, direction]
    if optimizer.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.name == "lamb":
        parts.append(_scale_by_trust_ratio(optimizer.trust_ratio, leaves))
    rate = learning_rate(optimizer, total_steps)
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def _direction(optimizer: Optimizer, leaves: Any) -> optax.GradientTransformation:
    """What the gradient becomes before weight decay and learning rate."""
    first, second = optimizer.betas
    moving = momentum_schedule(optimizer.schedule)
    match optimizer.name:
        case "adam" | "adamw" | "lamb":
            adam = optax.scale_by_adam if optimizer.bias_correction else _plain_adam
            return _inject(adam, moving, b1=first, b2=second, eps=optimizer.epsilon)
        case "lion":
            return _inject(optax.scale_by_lion, moving, b1=first, b2=second)
        case "sgd":
            if moving is None and optimizer.momentum == 0:
                return optax.identity()
            return _inject(optax.trace, moving, decay=optimizer.momentum)
        case "adagrad":
            # Optax adds epsilon under the root; squared, it is the guard beside it.
            return optax.scale_by_rss(
                initial_accumulator_value=0.0, eps=optimizer.epsilon**2
            )
        case "adafactor":
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        case "muon":
            own_rate = optimizer.adam_learning_rate
            adam = optax.scale_by_adam(b1=first, b2=second, eps=optimizer.epsilon)
            if own_rate is not None:
                ratio = own_rate / optimizer.learning_rate
                adam = optax.chain(adam, optax.scale(ratio))
            return scale_by_muon_and_adam(
                adam,
                momentum=optimizer.momentum,
                match_adam=own_rate is None,
                leaves=leaves,
            )


def _inject(
    piece: Callable[..., optax.GradientTransformation],
    moving: optax.Schedule | None,
    **numbers: float,
) -> optax.GradientTransformation:
    """`piece(**numbers)`, its first number replaced by a schedule if there is one."""
    if moving is None:
        return piece(**numbers)
    first, *_ = numbers
    return optax.inject_hyperparams(piece)(**{**numbers, first: moving})


def _plain_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction without bias correction, which optax's cannot leave out."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def _scale_by_trust_ratio(
    bounds: tuple[float, float], leaves: Any
) -> optax.GradientTransformation:
    """LAMB's layer-wise rate: |weight| / |update| within `bounds`; 1 where one is 0."""

    def scale(update: Array, param: Array, leaf: Leaf) -> Array:
        dims = own_dims(leaf)
        weight_norm = jnp.sqrt(jnp.sum(jnp.square(param), axis=dims, keepdims=True))
        update_norm = jnp.sqrt(jnp.sum(jnp.square(update), axis=dims, keepdims=True))
        zero = (weight_norm == 0) | (update_norm == 0)
        ratio = weight_norm / jnp.where(zero, 1, update_norm)
        return update * jnp.where(zero, 1, jnp.clip(ratio, *bounds))

    def update(updates: Any, params: Any) -> Any:
        named = spec.leaves(params) if leaves is None else leaves
        return jax.tree.map(scale, updates, params, named)

    return optax.stateless(update)
