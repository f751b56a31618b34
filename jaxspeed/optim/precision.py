"""Mixed precision: one dtype to compute in; master weights stay in float32."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jaxspeed.optim.loss_scale import LossScale

Compute = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtype of the forward and backward pass.

    Attributes:
        compute: dtype in which weights and activations meet.
        loss_scale: only read for float16, whose range is too small for gradients.
    """

    compute: Compute = "float32"
    loss_scale: LossScale = LossScale()

    def __post_init__(self) -> None:
        if self.compute not in get_args(Compute):
            raise ValueError(
                f"precision.compute is {self.compute!r}; it must be one of "
                f"{', '.join(get_args(Compute))}"
            )

    @property
    def dtype(self) -> Any:
        """`compute` as a numpy dtype."""
        return jnp.dtype(self.compute)

    @property
    def scales_loss(self) -> bool:
        """Whether the training step has to scale the loss."""
        return self.compute == "float16"
