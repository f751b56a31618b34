"""Optimizers by name, each a chain of optax pieces: clip, direction, decay, rate.

The update is written for whole arrays; where state is sharded, the compiler runs it
on the shards. Leaves may stack the layers of a model along a dim named `layers`;
what an algorithm does per matrix (LAMB's trust ratio, Muon's orthogonalization, which
leaves decay) is then done per layer. Papers: Adam 1412.6980, AdamW 1711.05101, LAMB
1904.00962, Lion 2302.06675, Adafactor 1804.04235, Muon 2502.16982 (all arXiv), and
Adagrad, Duchi et al., 2011.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from jaxspeed.optim.schedules import Schedule, build_schedule, momentum_schedule

Name = Literal["adam", "adamw", "adagrad", "lamb", "lion", "sgd", "muon", "adafactor"]
Decay = Literal["matrices", "all"]

STACKED = "layers"
"""Name of the dim along which a leaf holds the same weight of many layers."""


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
        weight_decay: times the learning rate, except where it is L2.
        momentum: of sgd (0 is none) and muon.
        clip_norm: gradients are scaled down to this global norm; None does not clip.
        decay: `matrices` spares norms and biases, that is, leaves with fewer than two
            dims besides the stack of layers; `all` spares nothing.
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
        for name in ("learning_rate", "epsilon", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be 0 or more"
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
    optimizer: Optimizer, total_steps: int, *, dims: Any = None
) -> optax.GradientTransformation:
    """The optax transformation for `optimizer`; its `update` needs the params.

    Args:
        optimizer: the rule and its numbers.
        total_steps: updates in the run, where the schedule ends.
        dims: a pytree like the params with a tuple of dim names per leaf; None where
            dims have no names, and then no leaf stacks layers.
    """
    parts = []
    if optimizer.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    decay = optax.add_decayed_weights(
        optimizer.weight_decay,
        mask=lambda params: _map(_is_matrix, params, dims)
        if optimizer.decay == "matrices"
        else True,
    )
    direction = _direction(optimizer, dims)
    l2 = optimizer.name in ("adam", "adagrad", "sgd")
    parts += [decay, direction] if l2 else [direction, decay]
    if optimizer.name == "lamb":
        parts.append(_scale_by_trust_ratio(optimizer.trust_ratio, dims))
    parts.append(optax.scale_by_learning_rate(learning_rate(optimizer, total_steps)))
    return optax.chain(*parts)


def _direction(optimizer: Optimizer, dims: Any) -> optax.GradientTransformation:
    """What the gradient becomes before weight decay and learning rate."""
    first, second = optimizer.betas
    moving = momentum_schedule(optimizer.schedule)
    match optimizer.name:
        case "adam" | "adamw" | "lamb":
            return _inject(
                optax.scale_by_adam, moving, b1=first, b2=second, eps=optimizer.epsilon
            )
        case "lion":
            return _inject(optax.scale_by_lion, moving, b1=first, b2=second)
        case "sgd":
            if moving is None and optimizer.momentum == 0:
                return optax.identity()
            return _inject(optax.trace, moving, decay=optimizer.momentum)
        case "adagrad":
            return optax.scale_by_rss(
                initial_accumulator_value=0.0, eps=optimizer.epsilon
            )
        case "adafactor":
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        case "muon":
            return _muon(optimizer, dims)


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


def _muon(optimizer: Optimizer, dims: Any) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        return _map(
            lambda leaf, names: "adam" if _matrix_dims(leaf, names) is None else "muon",
            params,
            dims,
        )

    def numbers(params: Any) -> Any:
        return _map(_matrix_dims, params, dims)

    first, second = optimizer.betas
    adam = optax.scale_by_adam(b1=first, b2=second, eps=optimizer.epsilon)
    if optimizer.adam_learning_rate is not None:
        ratio = optimizer.adam_learning_rate / optimizer.learning_rate
        adam = optax.chain(adam, optax.scale(ratio))
    # optax's `muon` descends; a rate of -1 leaves a direction like the other pieces'.
    muon = optax.contrib.muon(
        learning_rate=-1.0,
        beta=optimizer.momentum,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2 if optimizer.adam_learning_rate is None else None,
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)
