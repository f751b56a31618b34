"""Everything that a training step changes, as one pytree."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int, UInt32

from jaxspeed.optim.loss_scale import LossScaleState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, laid out over the mesh as ZeRO's table says.

    Attributes:
        step: int32 scalar, optimizer steps taken (skipped ones included).
        params: the parameters as the table's first column has them. In the compute
            dtype where `master` exists, otherwise float32.
        master: float32 weights in shards, where the table stores parameters whole and
            in a shorter dtype (stages 1 and 2 with bfloat16 or float16); else None.
        opt_state: the optax state, laid out like the table's third column.
        loss_scale: state of dynamic loss scaling, used in float16 only.
        skipped: int32 scalar, steps skipped because the loss or a gradient was not
            finite, or no sample had weight.
        key: uint32 data of the random key from which every step derives its own.
    """

    step: Int[Array, ""]
    params: Any
    master: Any
    opt_state: Any
    loss_scale: LossScaleState
    skipped: Int[Array, ""]
    key: UInt32[Array, "2"]

    @property
    def weights(self) -> Any:
        """The float32 weights: `master` where there is one, else `params`."""
        return self.params if self.master is None else self.master

    def random_key(self) -> Array:
        """The run's random key."""
        return jax.random.wrap_key_data(self.key, impl="threefry2x32")
