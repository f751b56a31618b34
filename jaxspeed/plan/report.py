"""The plan of a run: its training step compiled for devices that need not be there.

What is compiled is the very step that `train` runs. Memory is the compiler's own
account, traffic and operations are counted in the optimized program, and times are what
the chip's peaks allow at best.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxspeed.chips import Chip, chip_of
from jaxspeed.config import Config
from jaxspeed.mesh import BATCH_AXES, make_mesh
from jaxspeed.models.flops import model_flops
from jaxspeed.plan import advice, buffers, compiler, flops, hlo, traffic
from jaxspeed.plan.memory import program_memory
from jaxspeed.plan.model_state import ModelState, model_state
from jaxspeed.plan.placements import gradient_bytes, whole_leaves
from jaxspeed.plan.timeline import Timeline, timeline
from jaxspeed.plan.topology import num_devices, topology_devices
from jaxspeed.train.engine import initialize
from jaxspeed.train.loop import make_decoder


@dataclasses.dataclass(frozen=True)
class Report:
    """What one training step needs, on each device.

    Attributes:
        topology: as asked for.
        mesh: size of every mesh axis.
        chip: what the devices are; None for CPUs, whose limits and times are unknown.
        state: bytes of weights and optimizer state.
        gradient_bytes: a gradient per parameter, as the second column of ZeRO's table
            has them; they live in the pool.
        memory: the compiler's account of device memory.
        temp_bytes: `memory_analysis().temp_size_in_bytes`; the account's pool where the
            program was refused.
        host_bytes: in the host's memory, per device.
        refusal: the compiler's, if the program is too large for the chip.
        collectives: as `plan.collectives`, in program order.
        flops: operations of one device, those of recomputation included.
        model_flops: of the step on all devices, recomputation not counted.
        timeline: at the chip's peaks; None without a chip.
        replicated: parameters that every device holds whole although ZeRO would split
            them, with the reason.
        advice: what would make it fit; empty if it does.
        compile_seconds: that XLA took.
        global_batch, sequence_length: of the step.
    """

    topology: str
    mesh: dict[str, int]
    chip: Chip | None
    state: ModelState
    gradient_bytes: int
    memory: buffers.Memory
    temp_bytes: int
    host_bytes: int
    refusal: compiler.Refusal | None
    collectives: tuple[traffic.Collective, ...]
    flops: flops.Flops
    model_flops: float
    timeline: Timeline | None
    replicated: tuple[dict[str, Any], ...]
    advice: tuple[advice.Advice, ...]
    compile_seconds: float
    global_batch: int
    sequence_length: int

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether the compiler took it; where there is no limit, True."""
        limit = self.chip.usable_hbm_bytes if self.chip else None
        within = limit is None or self.memory.reserved_bytes <= limit
        return self.refusal is None and within

    @property
    def mfu_bound(self) -> float | None:
        """Model-FLOPs utilisation if the step took no longer than the timeline."""
        if self.chip is None or self.timeline is None or not self.timeline.seconds:
            return None
        peak = self.devices * self.chip.bf16_flops * self.timeline.seconds
        return self.model_flops / peak

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON types; bytes and operations are those of one device."""
        refusal = self.refusal
        return {
            "topology": self.topology,
            "devices": self.devices,
            "chip": self.chip.name if self.chip else None,
            "mesh": self.mesh,
            "params": self.state.num_params,
            "global_batch": self.global_batch,
            "sequence_length": self.sequence_length,
            "per_device": self._per_device(),
            "fits": self.fits,
            "refusal": refusal.message if refusal else None,
            "advice": [dataclasses.asdict(each) for each in self.advice],
            "buffers": [dataclasses.asdict(each) for each in self.memory.buffers[:10]],
            "temporaries": [
                dataclasses.asdict(each)
                for each in self.memory.buffers
                if each.kind == "temporary"
            ][:10],
            "collectives": self.collective_rows(),
            "bytes_by_axis": traffic.bytes_by_axis(self.collectives),
            "flops_per_device": self.flops.total,
            "model_flops_per_device": self.model_flops / self.devices,
            "unknown_kernels": sorted(self.flops.unknown_kernels),
            "trip_counts_known": self.flops.trip_counts_known,
            **self._times(),
            "compile_seconds": self.compile_seconds,
            "replicated_leaves": list(self.replicated),
        }

    def collective_rows(self) -> list[dict[str, Any]]:
        """Collectives by kind and axes, with how much of them is hidden (0 to 1).

        `hidden` is None where nothing is known about the chip.
        """
        rows = traffic.summarise(self.collectives)
        for row in rows:
            row["hidden"] = self._hidden(row["op"], tuple(row["axes"]))
        return rows

    def _hidden(self, op: str, axes: tuple[str, ...]) -> float | None:
        """The part of the bytes that is sent while the device computes."""
        if self.timeline is None:
            return None
        entries = [
            entry
            for entry in self.timeline.entries
            if (entry.collective.op, entry.collective.axes) == (op, axes)
        ]
        sent = sum(entry.collective.bytes_sent for entry in entries)
        hidden = sum(entry.hidden * entry.collective.bytes_sent for entry in entries)
        return hidden / sent if sent else None

    def _per_device(self) -> dict[str, Any]:
        memory, chip = self.memory, self.chip
        return {
            "params_bytes": self.state.params_bytes,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": self.state.optimizer_bytes,
            "temp_bytes": self.temp_bytes,
            "pool_bytes": memory.pool_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "peak_bytes": memory.peak_bytes,
            "host_bytes": self.host_bytes,
            "hbm_bytes": chip.hbm_bytes if chip else None,
            "usable_hbm_bytes": chip.usable_hbm_bytes if chip else None,
        }

    def _times(self) -> dict[str, Any]:
        line = self.timeline
        if line is None:
            unknown = dict.fromkeys(("compute", "memory", "network"))
            return {"roofline_seconds": unknown, "mfu_bound": None}
        network = dict(line.network_seconds)
        return {
            "roofline_seconds": {
                "compute": line.compute_seconds,
                "memory": line.memory_seconds,
                "network": sum(network.values()),
            },
            "network_seconds_by_axis": network,
            "step_seconds": line.seconds,
            "exposed_seconds": line.exposed_seconds,
            "hidden": line.hidden,
            "mfu_bound": self.mfu_bound,
        }


def report(config: Config, topology: str) -> Report:
    """Compiles the training step of `config` for `topology`, and reads the result.

    Args:
        config: the run, as for `train`.
        topology: `cpu:8`, `v5e:4x4`, `v5p:8x8x8`, ..., see `plan.topology_devices`.

    Raises:
        ValueError: an unknown topology, or a configuration that does not fit its
            devices or the model. A program that is too large is not an error.
        ImportError: the TPU compiler is not installed.
    """
    mesh = _mesh(config, topology)
    whole = config.mesh.resolve(mesh.size)
    config = dataclasses.replace(config.sized_for(mesh), mesh=whole)
    _check_rows(config, mesh)
    engine = initialize(config, lambda rngs: make_decoder(config, rngs), mesh=mesh)
    lowered = engine.lower(batch_shapes(config))
    return _read(config, topology, mesh, compiler.compile_lowered(lowered))


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch that `data.train_batches` yields, [size, sequence]."""
    shape = (config.batch.size, config.data.sequence_length)
    ids = ("tokens", "targets", "segments", "positions")
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ids}
    return shapes | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _mesh(config: Config, topology: str) -> Mesh:
    try:
        config.mesh.resolve(num_devices(topology))
    except ValueError as error:
        if str(error).startswith("unknown topology"):
            raise
        problem = str(error).partition(". ")[0]
        raise ValueError(
            f"topology {topology} has {num_devices(topology)} devices; {problem}. "
            "Change a size, or let one axis be -1: it takes what is left"
        ) from error
    return make_mesh(config.mesh, devices=topology_devices(topology))


def _check_rows(config: Config, mesh: Mesh) -> None:
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    pieces = shards * config.batch.accumulation
    if config.batch.size % pieces:
        raise ValueError(
            f"batch.size={config.batch.size} does not divide by {shards} (mesh replica "
            f"x data x expert) times {config.batch.accumulation} (batch.accumulation): "
            f"use a multiple of {pieces}, or batch.per_device=1"
        )


def _read(
    config: Config, topology: str, mesh: Mesh, program: compiler.Compilation
) -> Report:
    chip = chip_of(mesh.devices.flat[0])
    memory = buffers.memory(
        hlo.parse(program.text), program.assignment, program.live_ranges
    )
    sizes = program_memory(program.compiled) if program.compiled else {}
    line = timeline(program.text, mesh, chip) if chip else None
    state = model_state(config, mesh.shape)
    length = config.data.sequence_length
    made = Report(
        topology=topology,
        mesh=dict(mesh.shape),
        chip=chip,
        state=state,
        gradient_bytes=gradient_bytes(state, mesh.shape),
        memory=memory,
        temp_bytes=sizes.get("temp_bytes") or memory.pool_bytes,
        host_bytes=sizes.get("host_bytes") or 0,
        refusal=program.refusal,
        collectives=tuple(traffic.collectives(program.text, mesh)),
        flops=line.flops if line else flops.flops(program.text),
        model_flops=model_flops(config.model, config.batch.size * length, length),
        timeline=line,
        replicated=tuple(whole_leaves(config.zero, state, mesh.shape)),
        advice=(),
        compile_seconds=program.seconds,
        global_batch=config.batch.size,
        sequence_length=length,
    )
    if made.fits or chip is None:
        return made
    missing = memory.reserved_bytes - chip.usable_hbm_bytes
    found = advice.what_would_fit(config, mesh.size, chip, missing)
    return dataclasses.replace(made, advice=tuple(found))
