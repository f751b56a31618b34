"""Devices to compile for that need not exist: CPUs, pieces of TPU pods, hosts of GPUs.

The TPU compiler (`libtpu`, the extra `plan`) runs on any machine. A topology is named
after its chips, `v5p:4x4x8`; which names the compiler takes was found by compiling for
them: `libtpu` itself crashes on some that are wrong. The GPU compiler comes with JAX's
CUDA plugin (the extra `check`) and needs neither a GPU nor CUDA on Linux.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxspeed.chips import GPUS_PER_HOST
from kernels_pallas.check.chips import CHIPS as COMPILER_CHIPS
from kernels_pallas.check.chips import Gpu

GPUS = {name: chip for name, chip in COMPILER_CHIPS.items() if isinstance(chip, Gpu)}
"""GPUs that can be compiled for, by the name they have in a topology."""

_NAME = re.compile(r"([a-z]+\d*[a-z]*):(\d+(?:x\d+)*)")
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Left unset, libtpu looks for these and complains at length.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """The topologies of one TPU generation.

    Attributes:
        largest: chips along each side of the largest, the longest last.
        devices_per_chip: JAX devices on one chip.
        rule: what a shape must be, in words.
        examples: shapes to choose from, small to large.
    """

    largest: tuple[int, ...]
    devices_per_chip: int
    rule: str
    examples: tuple[str, ...]

    def has(self, shape: tuple[int, ...]) -> bool:
        """Whether the compiler takes chips in this shape."""
        longest = self.largest[-1]
        if len(shape) != len(self.largest) or not all(0 < s <= longest for s in shape):
            return False
        if len(shape) == 2:
            powers = all(side & (side - 1) == 0 for side in shape)
            return powers and max(shape) <= 4 * min(shape)
        hosts = all(side == 1 or side % 2 == 0 for side in shape[:2])
        return hosts and math.prod(shape) <= math.prod(self.largest)


_FLAT = (
    "XxY, both 1, 2, 4, 8 or 16 and neither more than four times the other",
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
)
_SOLID_EXAMPLES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    *("8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)


def _solid(largest: tuple[int, int, int], devices_per_chip: int) -> Generation:
    sides, chips = largest[-1], math.prod(largest)
    rule = f"XxYxZ, X and Y 1 or even, none over {sides}, at most {chips} chips"
    return Generation(largest, devices_per_chip, rule, _SOLID_EXAMPLES)


GENERATIONS = {
    "v5e": Generation((16, 16), 1, *_FLAT),
    "v5p": _solid((16, 20, 28), 1),
    "v6e": Generation((16, 16), 1, *_FLAT),
    "tpu7x": _solid((16, 24, 24), 2),
}
"""TPU generations by the name they have in a topology."""


def num_devices(topology: str) -> int:
    """How many JAX devices a topology has; needs no compiler.

    Args:
        topology: `cpu:8`, `v5e:4x4`, `v5p:8x8x8`, `v6e:16x16`, `tpu7x:2x2x1` (two
            devices per chip), `h200:16` (two hosts of eight), ...

    Raises:
        ValueError: no such topology; lists the known ones.
    """
    match = _NAME.fullmatch(topology)
    sides = tuple(map(int, match[2].split("x"))) if match else ()
    if match and match[1] in ("cpu", *GPUS) and len(sides) == 1 and sides[0] > 0:
        hosts_are_full = sides[0] <= GPUS_PER_HOST or sides[0] % GPUS_PER_HOST == 0
        if match[1] == "cpu" or hosts_are_full:
            return sides[0]
    generation = GENERATIONS.get(match[1]) if match else None
    if generation is None or not generation.has(sides):
        raise ValueError(_unknown(topology))
    return math.prod(sides) * generation.devices_per_chip


def topology_devices(topology: str) -> list[Any]:
    """The devices of a topology, to make a mesh of and to compile for.

    Args:
        topology: as for `num_devices`. `cpu:N` takes N simulated devices, which must
            have been asked for before JAX started.

    Raises:
        ValueError: no such topology, or fewer CPU devices than it names.
        ImportError: the TPU or GPU compiler is not installed.
    """
    count, name = num_devices(topology), topology.partition(":")[0]
    if name == "cpu":
        return _cpus(count)
    return _gpus(GPUS[name], count) if name in GPUS else _tpus(topology)


def _cpus(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"topology cpu:{count} needs {count} simulated devices, JAX has "
            f"{len(devices)}: call jax.config.update('jax_num_cpu_devices', "
            f"{count}) before anything else uses JAX"
        )
    return devices[:count]


def _gpus(chip: Gpu, count: int) -> list[Any]:
    per_host = min(count, GPUS_PER_HOST)
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=chip.target,
            topology=f"1x{count // per_host}x{per_host}",
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ImportError(
            f"topology {chip.name}:{count} needs JAX's CUDA plugin, of JAX's version: "
            f"pip install 'jaxspeed[check]' (as it is: {error})"
        ) from error
    return list(description.devices)


def _tpus(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"topology {topology} needs the TPU compiler, libtpu, which is not "
            "installed: pip install 'jaxspeed[plan]'"
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        # A host holds 2x2 chips, which fewer do not fill.
        chips_per_host_bounds=(min(2, sides[0]), min(2, sides[1]), 1),
    )
    return list(description.devices)


def _unknown(topology: str) -> str:
    lines = [
        f"{name}:{' '.join(known.examples)} (any {known.rule})"
        for name, known in GENERATIONS.items()
    ]
    gpus = ", ".join(f"{name}:N" for name in GPUS)
    return (
        f"unknown topology {topology!r}; known are cpu:N, {gpus} (N up to "
        f"{GPUS_PER_HOST} or a multiple of it), {'; '.join(lines)}"
    )
