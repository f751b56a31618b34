"""Learning-rate schedules: two everyday ones, and DeepSpeed's five to the letter.

A schedule maps the number of updates already made, a traced integer, to the learning
rate of the next one. DeepSpeed steps its scheduler after the optimizer, so its
formulas lag by one: update 0 runs at the scheduler's initial value and update t at
its formula for batch t - 1. The schedules here give what the optimizer really uses.
The range test and the one-cycle policy are from Smith, 2018 (arXiv:1803.09820).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

Kind = Literal[
    "constant",
    "warmup_linear",
    "warmup_cosine",
    "LRRangeTest",
    "OneCycle",
    "WarmupLR",
    "WarmupDecayLR",
    "WarmupCosineLR",
]
Shape = Literal["log", "linear"]


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """DeepSpeed's LRRangeTest: the rate grows until training diverges.

    Attributes:
        step_size: updates per interval.
        step_rate: growth per interval, as a fraction of the first learning rate.
        staircase: grow once per interval instead of at every update.
    """

    step_size: int = 2000
    step_rate: float = 1.0
    staircase: bool = False

    def __post_init__(self) -> None:
        if self.step_size < 1:
            raise ValueError(
                f"range_test.step_size is {self.step_size}; it must be 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class OneCycle:
    """DeepSpeed's OneCycle: up, down, then decay; momentum moves the other way.

    Attributes:
        first_steps: updates on the way up.
        second_steps: updates on the way down; None is as many as `first_steps`.
        first_stairs: number of stairs on the way up; 0 is a straight line.
        second_stairs: the same on the way down; None is `first_stairs`.
        decay_steps: updates per interval of decay after the cycle; 0 is no decay.
        decay_rate: the rate is divided by 1 + decay_rate per interval, linearly.
        cycle_momentum: whether momentum (the first beta) moves too.
        min_momentum: momentum at the highest learning rate.
        max_momentum: momentum at both ends of the cycle.
        momentum_decay_rate: growth of momentum per interval after the cycle.
    """

    first_steps: int = 2000
    second_steps: int | None = None
    first_stairs: int = 0
    second_stairs: int | None = None
    decay_steps: int = 0
    decay_rate: float = 0.0
    cycle_momentum: bool = True
    min_momentum: float = 0.8
    max_momentum: float = 0.9
    momentum_decay_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.first_steps < 1:
            raise ValueError(
                f"one_cycle.first_steps is {self.first_steps}; it must be 1 or more"
            )
        for name in ("second_steps", "first_stairs", "second_stairs", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"one_cycle.{name} is {value}; it must be 0 or more")

    @property
    def total_steps(self) -> int:
        """Updates in the cycle, up and down."""
        down = self.first_steps if self.second_steps is None else self.second_steps
        return self.first_steps + down


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves around the optimizer's `learning_rate`, its peak.

    Attributes:
        kind: `constant` (after the warm-up), `warmup_linear` and `warmup_cosine` fall
            from the peak to `floor` at the end of the run; the other names are
            DeepSpeed's. LRRangeTest starts at the "peak" and rises from there.
        warmup_steps: updates of warm-up; DeepSpeed's Warmup kinds need at least 1.
        start: where warm-up (or the cycle) begins, as a fraction of the peak.
        floor: where the decay ends, as a fraction of the peak; WarmupDecayLR falls
            back to `start` instead.
        total_steps: the update at which the decay ends; None is the end of the run.
        warmup_shape: `log` or `linear`, for DeepSpeed's Warmup kinds only; the others
            warm up linearly.
        one_cycle: numbers of `OneCycle`.
        range_test: numbers of `LRRangeTest`.
    """

    kind: Kind = "warmup_cosine"
    warmup_steps: int = 0
    start: float = 0.0
    floor: float = 0.1
    total_steps: int | None = None
    warmup_shape: Shape = "log"
    one_cycle: OneCycle = OneCycle()
    range_test: RangeTest = RangeTest()

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("warmup_shape", Shape)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(
                    f"schedule.{name} is {value!r}; it must be one of "
                    f"{', '.join(get_args(allowed))}"
                )
        for name in ("start", "floor"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"schedule.{name} is {value}; it is a fraction of the optimizer's "
                    "learning_rate and must lie between 0 and 1"
                )
        least = 1 if self.kind.startswith("Warmup") else 0
        if self.warmup_steps < least:
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_steps}; {self.kind} needs "
                f"{least} or more"
            )


def build_schedule(
    schedule: Schedule, peak_learning_rate: float, total_steps: int
) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made.

    Args:
        schedule: its kind and numbers.
        peak_learning_rate: the optimizer's learning rate.
        total_steps: updates in the run; `schedule.total_steps` overrides it.

    Returns:
        A function from an integer scalar, traced or not, to a float32 scalar. Its
        argument counts the updates that were applied: a step that loss scaling skips
        does not count, as in DeepSpeed. A run that is shorter than the warm-up ends
        in it.
    """
    total = total_steps if schedule.total_steps is None else schedule.total_steps
    factor = _FACTORS[schedule.kind]

    def learning_rate(step: ArrayLike) -> Float[Array, ""]:
        count = jnp.asarray(step, jnp.int32)
        return peak_learning_rate * factor(schedule, count, total)

    return learning_rate


def momentum_schedule(schedule: Schedule) -> optax.Schedule | None:
    """Momentum (or the first beta) by number of updates made; None if it is constant.

    DeepSpeed's constructor writes the lower bound, so update 0 runs at `min_momentum`
    although the cycle starts at `max_momentum`.
    """
    cycle = schedule.one_cycle
    if schedule.kind != "OneCycle" or not cycle.cycle_momentum:
        return None

    def momentum(step: ArrayLike) -> Float[Array, ""]:
        count = jnp.asarray(step, jnp.int32)
        span = cycle.max_momentum - cycle.min_momentum
        cycling = cycle.max_momentum - span * _cycle_position(cycle, count)
        growth = 1 + cycle.momentum_decay_rate * _intervals_after_cycle(cycle, count)
        after = cycle.max_momentum * growth
        value = jnp.where(count <= cycle.total_steps, cycling, after)
        return jnp.where(count == 0, cycle.min_momentum, value)

    return momentum


def _constant(schedule: Schedule, step: Array, total: int) -> Array:
    return _linear_warmup(schedule, step, jnp.ones(()))


def _warmup_linear(schedule: Schedule, step: Array, total: int) -> Array:
    left = 1 - _progress(step, schedule.warmup_steps, total)
    decayed = schedule.floor + (1 - schedule.floor) * left
    return _linear_warmup(schedule, step, decayed)


def _warmup_cosine(schedule: Schedule, step: Array, total: int) -> Array:
    left = (1 + jnp.cos(jnp.pi * _progress(step, schedule.warmup_steps, total))) / 2
    decayed = schedule.floor + (1 - schedule.floor) * left
    return _linear_warmup(schedule, step, decayed)


def _linear_warmup(schedule: Schedule, step: Array, afterwards: Array) -> Array:
    fraction = step / max(1, schedule.warmup_steps)
    rising = schedule.start + (1 - schedule.start) * fraction
    return jnp.where(step < schedule.warmup_steps, rising, afterwards)


def _progress(step: Array, begin: int, end: int) -> Array:
    return jnp.clip((step - begin) / max(1, end - begin), 0, 1)


def _lr_range_test(schedule: Schedule, step: Array, total: int) -> Array:
    test = schedule.range_test
    interval = step / test.step_size
    if test.staircase:
        interval = (step // test.step_size).astype(jnp.float32)
    return 1 + test.step_rate * interval


def _one_cycle(schedule: Schedule, step: Array, total: int) -> Array:
    cycle, low = schedule.one_cycle, schedule.start
    cycling = low + (1 - low) * _cycle_position(cycle, step)
    after = low / (1 + cycle.decay_rate * _intervals_after_cycle(cycle, step))
    return jnp.where(step <= cycle.total_steps, cycling, after)


def _cycle_position(cycle: OneCycle, step: Array) -> Array:
    """Height in the cycle, 0 at its ends and 1 at its top; integers until the end.

    A quotient of floats can land just below a stair, off by a whole one.
    """
    down = cycle.total_steps - cycle.first_steps
    stairs = cycle.first_stairs
    other = stairs if cycle.second_stairs is None else cycle.second_stairs
    at = step % cycle.total_steps
    rising = _in_stairs(at, cycle.first_steps, stairs)
    falling = _in_stairs(cycle.total_steps - at, max(1, down), other)
    return jnp.where(at <= cycle.first_steps, rising, falling)


def _in_stairs(at: Array, steps: int, stairs: int) -> Array:
    return (at * stairs // steps) / stairs if stairs else at / steps


def _intervals_after_cycle(cycle: OneCycle, step: Array) -> Array:
    if cycle.decay_steps == 0:
        return jnp.zeros(())
    return jnp.maximum(0, step - cycle.total_steps) / cycle.decay_steps


def _warmup_lr(schedule: Schedule, step: Array, total: int) -> Array:
    return _deepspeed_warmup(schedule, step, jnp.ones(()))


def _warmup_decay_lr(schedule: Schedule, step: Array, total: int) -> Array:
    warmup = max(2, schedule.warmup_steps)
    left = (total - (step - 1)) / max(1, total - warmup)
    decayed = schedule.start + (1 - schedule.start) * jnp.maximum(0, left)
    return _deepspeed_warmup(schedule, step, decayed)


def _warmup_cosine_lr(schedule: Schedule, step: Array, total: int) -> Array:
    warmup = max(2, schedule.warmup_steps)
    progress = jnp.minimum(1, (step - warmup) / max(1, total - warmup))
    left = (1 + jnp.cos(jnp.pi * progress)) / 2
    decayed = schedule.floor + (1 - schedule.floor) * left
    factor = _deepspeed_warmup(schedule, step, decayed)
    return jnp.where(step == 0, 0.0, factor)


def _deepspeed_warmup(schedule: Schedule, step: Array, afterwards: Array) -> Array:
    steps = max(2, schedule.warmup_steps)
    batch = jnp.maximum(step - 1, 0)  # DeepSpeed's formulas lag by one update
    if schedule.warmup_shape == "log":
        fraction = jnp.log1p(batch) / jnp.log(steps)
    else:
        fraction = batch / steps
    rising = schedule.start + (1 - schedule.start) * fraction
    return jnp.where(step - 1 < steps, rising, afterwards)


_FACTORS: dict[Kind, Callable[[Schedule, Array, int], Array]] = {
    "constant": _constant,
    "warmup_linear": _warmup_linear,
    "warmup_cosine": _warmup_cosine,
    "LRRangeTest": _lr_range_test,
    "OneCycle": _one_cycle,
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay_lr,
    "WarmupCosineLR": _warmup_cosine_lr,
}
