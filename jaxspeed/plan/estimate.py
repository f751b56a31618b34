"""Memory, traffic and time of a training step in milliseconds, before any compile.

State is exact; the rest are closed forms of what the program is known to keep and to
send (`activations`, `volume`). `plan.report` asks the compiler, which decides.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from jaxspeed.chips import Chip
from jaxspeed.config import Config
from jaxspeed.mesh import AXES, BATCH_AXES
from jaxspeed.models.flops import model_flops
from jaxspeed.parallel import tensor
from jaxspeed.plan.activations import Activations
from jaxspeed.plan.model_state import ModelState, model_state
from jaxspeed.plan.step_flops import step_flops
from jaxspeed.plan.volume import link_seconds, step_volume
from jaxspeed.plan.working_set import WorkingSet, gradient_bytes, working_set
from jaxspeed.spec import Sizes

BATCH_BYTES = 20
"""Bytes of a batch per token: tokens, targets, segments, positions and weights."""

# What compiled programs do, by `plan.timeline`: ZeRO 0 to 3 and every policy on v5e,
# Llama 3 with ZeRO-3 on 4 to 512 chips of every generation (`jaxspeed bench pods`).
STREAM_PASSES, SAVED_PASSES = 4, 3
"""How often device memory is passed over for what a layer makes, and for the part of it
that is kept for the backward pass."""

EXPOSED = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.3}
"""Fraction of the transfers' time in which the device waits, by ZeRO stage. Stage 3
sends under the layers, the others at the end; tensor parallelism always waits."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step needs, by formula. Bytes are those of one device.

    Attributes:
        mesh: size of every mesh axis.
        global_batch: sequences in a step, on all devices together.
        sequences: sequences of one micro-batch on one device.
        num_params: parameters of the whole model.
        params_bytes: the weights as ZeRO's first column has them.
        optimizer_bytes: the optimizer's state, float32 masters where they are apart,
            and the run's counters.
        batch_bytes: the step's batch.
        gradient_bytes: gradients at the end of the backward pass, and their sum over
            micro-batches.
        working: what else is alive at the fullest moment.
        bytes_by_axis: sent in a step; axes as `plan.bytes_by_axis` names them.
        model_flops: of the step on all devices, recomputation not counted.
        flops_per_device: with recomputation.
        chip: that the seconds are for, if any.
        compute_seconds, memory_seconds: at the chip's peaks; None without a chip.
        network_seconds: by axes, as `bytes_by_axis`; None without a chip.
        exposed_seconds: of them, those that no computation hides; None without a chip.
        replicated: paths of the parameters that stay whole although ZeRO would split
            them.
    """

    mesh: Mapping[str, int]
    global_batch: int
    sequences: int
    num_params: int
    params_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    gradient_bytes: int
    working: WorkingSet
    bytes_by_axis: Mapping[str, int]
    model_flops: float
    flops_per_device: float
    chip: Chip | None
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: Mapping[str, float] | None
    exposed_seconds: float | None
    replicated: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """All that lives from step to step, and the batch: the program's arguments."""
        return self.params_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def activation_bytes(self) -> int:
        """All that is alive at the fullest moment but state and stored gradients."""
        return self.working.bytes

    @property
    def total_bytes(self) -> int:
        """The most in use at any time."""
        return self.state_bytes + self.gradient_bytes + self.activation_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the chip's usable memory holds it; None without a chip."""
        if self.chip is None:
            return None
        return self.total_bytes <= self.chip.usable_hbm_bytes

    @property
    def seconds(self) -> float | None:
        """The roofline: the slowest of the three, the others hidden under it."""
        times = self._times()
        return None if times is None else max(times.values())

    @property
    def expected_seconds(self) -> float | None:
        """The step's time as its schedule will be: matmuls and the rest take turns.

        Of the network's time only what no computation hides counts.
        """
        times = self._times()
        if times is None or self.exposed_seconds is None:
            return None
        return times["compute"] + times["memory"] + self.exposed_seconds

    @property
    def limit(self) -> str | None:
        """What bounds the time: `compute`, `memory` or `network`; or `capacity`."""
        times = self._times()
        if times is None:
            return None
        return max(times, key=lambda name: times[name]) if self.fits else "capacity"

    @property
    def mfu_bound(self) -> float | None:
        """The highest possible model-FLOPs utilisation, 0 to 1."""
        if self.chip is None or not self.seconds:
            return None
        devices = math.prod(self.mesh.values())
        return self.model_flops / (devices * self.chip.bf16_flops * self.seconds)

    def _times(self) -> dict[str, float] | None:
        if (
            self.compute_seconds is None
            or self.memory_seconds is None
            or self.network_seconds is None
        ):
            return None
        return {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": sum(self.network_seconds.values()),
        }


def estimate(config: Config, num_devices: int, chip: Chip | None = None) -> Estimate:
    """What a training step of the decoder in `config` needs on so many devices.

    Args:
        config: as `train` takes it.
        num_devices: of the whole run.
        chip: what the devices are, for seconds and for whether it fits.

    Raises:
        ValueError: the mesh does not fit the devices, an axis does not divide a dim
            that it splits, or the batch does not divide.
    """
    shape = config.mesh.resolve(num_devices)
    sizes = {axis: getattr(shape, axis) for axis in AXES}
    config, sequences = _sized(config, sizes)
    state = model_state(config, sizes)
    accumulation = config.batch.accumulation
    activations = Activations.of(
        config.model,
        sizes,
        sequences=sequences,
        length=config.data.sequence_length,
        compute=config.precision.compute,
    )
    volume = step_volume(
        state, activations, sizes, remat=config.remat, accumulation=accumulation
    )
    flops = step_flops(
        activations,
        remat=config.remat,
        accumulation=accumulation,
        num_devices=num_devices,
    )
    tokens = config.batch.size * config.data.sequence_length
    gradients = gradient_bytes(state, sizes, accumulation=accumulation)
    touched = _touched_bytes(config, state, activations, gradients)
    network = link_seconds(volume, sizes, chip) if chip else None
    return Estimate(
        mesh=sizes,
        global_batch=config.batch.size,
        sequences=sequences,
        num_params=state.num_params,
        params_bytes=state.params_bytes,
        optimizer_bytes=state.optimizer_bytes,
        batch_bytes=BATCH_BYTES * activations.tokens * accumulation,
        gradient_bytes=gradients,
        working=working_set(state, activations, sizes, remat=config.remat),
        bytes_by_axis={axes: round(sent) for axes, sent in volume.items()},
        model_flops=model_flops(config.model, tokens, config.data.sequence_length),
        flops_per_device=flops,
        chip=chip,
        compute_seconds=chip and flops / chip.bf16_flops,
        memory_seconds=chip and touched / chip.hbm_bytes_per_second,
        network_seconds=network,
        exposed_seconds=None
        if network is None
        else _exposed(network, config.zero.stage),
        replicated=state.replicated,
    )


def _sized(config: Config, sizes: Sizes) -> tuple[Config, int]:
    """`config` with its batch size written out, and the sequences per micro-batch."""
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    config = config.sized_for(mesh)
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    size, accumulation = config.batch.size, config.batch.accumulation
    if size % (shards * accumulation):
        raise ValueError(
            f"batch.size={size} does not divide by {shards} (mesh replica x data x "
            f"expert) times batch.accumulation={accumulation}; use a multiple of "
            f"{shards * accumulation}"
        )
    return config, size // shards // accumulation


def _exposed(network: Mapping[str, float], stage: int) -> float:
    return sum(
        seconds * (1 if axes == tensor.AXIS else EXPOSED[stage])
        for axes, seconds in network.items()
    )


def _touched_bytes(
    config: Config, state: ModelState, activations: Activations, gradients: int
) -> int:
    """Device memory read and written in a step.

    Every micro-batch reads all weights forward, backward and to recompute, and writes
    their gradients; the update reads and writes all of the state.
    """
    weights = state.num_params // activations.shards * activations.width
    passes = 3 if config.remat == "none" else 4
    layer = STREAM_PASSES * activations.everything()
    layer += SAVED_PASSES * activations.saved(config.remat)
    streams = config.model.num_layers * layer
    update = 2 * (state.params_bytes + state.optimizer_bytes) + 2 * gradients
    return config.batch.accumulation * (passes * weights + streams) + update
