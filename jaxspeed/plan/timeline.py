"""When a compiled program computes, and when it waits for the network.

The text of a compiled program is a schedule: each computation's instructions run in
the order written. They are walked with a clock, at the chip's peaks: an instruction
takes the longer of its operations and its bytes of memory, a transfer the time of its
links, beginning at its start and waited for at its done. The result bounds the step's
time from below and shows what of the communication is hidden under computation.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxspeed.chips import Chip
from jaxspeed.plan import flops, hlo, loops, traffic
from jaxspeed.plan.collective import Collective
from jaxspeed.plan.device import Device
from jaxspeed.plan.text import text_of
from jaxspeed.plan.walk import Walk


@dataclasses.dataclass(frozen=True)
class Entry:
    """A collective of the program, and its time in one run.

    Attributes:
        collective: what it sends; `count` and `bytes_sent` are of all executions.
        seconds: on the links, all executions.
        exposed_seconds: the part of them in which the device waited.
    """

    collective: Collective
    seconds: float
    exposed_seconds: float

    @property
    def hidden(self) -> float:
        """The fraction of its time that passes under computation, 0 to 1."""
        if not self.seconds:
            return 1.0
        return min(1.0, max(0.0, 1 - self.exposed_seconds / self.seconds))


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where the time of one run of a program goes, at the chip's peaks.

    Attributes:
        seconds: from start to end.
        compute_seconds: all operations at the peak for bfloat16.
        memory_seconds: all bytes of device memory at its bandwidth.
        network_seconds: transfers, summed over those with the same mesh axes, keyed
            `data`, `data+seq`.
        exposed_seconds: in which the device did nothing but wait for transfers.
        entries: the collectives, in program order.
        flops: what is computed.
        chip: the figures that it counts with.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    network_seconds: Mapping[str, float]
    exposed_seconds: float
    entries: tuple[Entry, ...]
    flops: flops.Flops
    chip: Chip

    @property
    def bytes_sent(self) -> int:
        """Bytes that one device sends."""
        return sum(entry.collective.bytes_sent for entry in self.entries)

    @property
    def hidden_bytes(self) -> float:
        """The part of `bytes_sent` that is sent under computation."""
        return sum(entry.hidden * entry.collective.bytes_sent for entry in self.entries)

    @property
    def hidden(self) -> float:
        """The fraction of the bytes that is sent under computation, 1 if none are."""
        return self.hidden_bytes / self.bytes_sent if self.bytes_sent else 1.0

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds by resource, each as if the others took no time.

        `compute`, `memory`, and `network`, that of the axes that take longest:
        transfers over different axes can go on at once.
        """
        return {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": max(self.network_seconds.values(), default=0.0),
        }

    @property
    def limit(self) -> str:
        """The resource that takes longest: `compute`, `memory` or `network`."""
        return max(self.roofline, key=self.roofline.__getitem__)

    def mfu_bound(self, model_flops: float) -> float:
        """The model-FLOPs utilisation that the timeline allows at most.

        Args:
            model_flops: operations per device and run that the model needs, without
                recomputation (6ND).
        """
        return model_flops / (self.chip.bf16_flops * self.seconds)


def timeline(
    program: jax.stages.Compiled | str, mesh: Mesh | AbstractMesh, chip: Chip
) -> Timeline:
    """The time of one run of a compiled program, and how it is spent.

    Args:
        program: `jax.jit(f).lower(...).compile()`, or its text.
        mesh: that it was compiled for. Devices that know their place in a TPU's grid
            give distances; without, each axis counts as a ring of its own.
        chip: the figures to count with.

    Raises:
        ValueError: as `collectives` and `flops`.
    """
    module = hlo.parse(text_of(program))
    traffic.check_devices(module, mesh)
    scope = loops.Scope(module, module.computations[module.entry])
    device = Device(mesh, chip)
    Walk(device).run(scope)
    entries = tuple(
        Entry(collective, seconds, device.clock.exposed.get(account, 0.0))
        for account, (collective, seconds) in enumerate(device.sent)
        if collective.count
    )
    per_axes: dict[str, float] = {}
    for entry in entries:
        key = "+".join(entry.collective.axes)
        per_axes[key] = per_axes.get(key, 0.0) + entry.seconds
    computed = flops.scope_flops(scope)
    return Timeline(
        seconds=device.clock.end,
        compute_seconds=computed.total / chip.bf16_flops,
        memory_seconds=computed.hbm_bytes / chip.hbm_bytes_per_second,
        network_seconds=per_axes,
        exposed_seconds=device.clock.waited,
        entries=entries,
        flops=computed,
        chip=chip,
    )
