"""Loss scaling for float16, Micikevicius et al., 2018, on DeepSpeed's trajectory.

Small gradients vanish in float16, so the loss is multiplied by `scale` before the
backward pass and the gradients are divided by it afterwards. The dynamic scale halves
when gradients overflow and doubles at a good step that has `window` good steps (or a
multiple) directly before it. With hysteresis h the first h - 1 overflows are forgiven;
what is spent comes back when the scale next grows, or with `consecutive_hysteresis` at
the next good step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How the loss is scaled in float16.

    Attributes:
        static: a fixed scale; None scales dynamically and uses the rest.
        initial_power: the dynamic scale starts at 2 to this power.
        window: good steps in a row that let the next good one double the scale.
        hysteresis: overflows until the scale halves.
        minimum: the scale never falls below it.
        consecutive_hysteresis: only overflows in a row count.
    """

    static: float | None = None
    initial_power: int = 16
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    consecutive_hysteresis: bool = False

    def __post_init__(self) -> None:
        if self.static is not None and self.static <= 0:
            raise ValueError(
                f"loss_scale.static is {self.static}; give a positive scale, or None "
                "to scale dynamically"
            )
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"loss_scale.{name} is {getattr(self, name)}; it must be 1 or more"
                )
        if not 0 <= self.initial_power <= 127:
            raise ValueError(
                f"loss_scale.initial_power is {self.initial_power}; 2 to this power "
                "must be a float32, so give 0 to 127"
            )
        if self.minimum <= 0:
            raise ValueError(
                f"loss_scale.minimum is {self.minimum}; it must be positive"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScaleState:
    """What the training state carries from step to step; three scalars.

    Attributes:
        scale: what the loss is multiplied by.
        good_steps: steps since the last overflow (or the start).
        hysteresis: overflows left until the scale halves.
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    hysteresis: Int[Array, ""]


def init(config: LossScale) -> LossScaleState:
    """The state before the first step."""
    scale = 2.0**config.initial_power if config.static is None else config.static
    return LossScaleState(
        scale=jnp.asarray(scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
        hysteresis=jnp.asarray(config.hysteresis, jnp.int32),
    )


def update(
    config: LossScale, state: LossScaleState, finite: Bool[Array, ""]
) -> LossScaleState:
    """The state after a step, to be called for skipped steps too.

    Args:
        config: the same as for `init`.
        state: the state that the step used.
        finite: whether all gradients of the step were finite. If not, the caller
            leaves parameters and optimizer state as they were. DeepSpeed stops a run
            that overflows at the minimum; here the scale stays there, and the caller
            can watch `scale` and the number of skipped steps.
    """
    if config.static is not None:
        return state
    before = state.good_steps
    grow = finite & (before > 0) & (before % config.window == 0)
    shrink = ~finite & (state.hysteresis == 1)
    halved = jnp.maximum(state.scale / 2, config.minimum)
    scale = jnp.where(shrink, halved, jnp.where(grow, state.scale * 2, state.scale))
    refill = finite if config.consecutive_hysteresis else grow
    spent = jnp.where(finite, state.hysteresis, jnp.maximum(1, state.hysteresis - 1))
    hysteresis = jnp.where(refill, config.hysteresis, spent)
    return LossScaleState(scale, jnp.where(finite, before + 1, 0), hysteresis)
