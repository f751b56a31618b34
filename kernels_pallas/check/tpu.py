"""A program compiled for a TPU that is not there, and its final schedule counted.

Works only in a process that was started with `environment`: the compiler reads its
flags once.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.check import tpu_dump
from kernels_pallas.check.case import Case
from kernels_pallas.check.chips import Tpu
from kernels_pallas.check.result import NoCompiler, NoDump

FIGURES = {
    "cycles": "of one core, for the kernels of the case",
    "hbm_cycles": "that moving the case's bytes takes at full bandwidth",
    "cycles_per_64k": "cycles per 65536 weights",
    "mxu": "share of the matrix units' slots that is used",
    "spills": "vector registers stored for want of registers",
    "vmem_bytes": "of the largest kernel",
}


def environment(dump: str) -> dict[str, str]:
    """Variables of a process that compiles, and writes its schedules into `dump`."""
    flags = (
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        # Of a hundred files a kernel, the one with a row per cycle.
        "--xla_jf_dump_llo_pass_label_regex=pre-delay_hlo",
    )
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(flags),
    }


def measure(case: Case, chip: Tpu, dump: pathlib.Path) -> dict[str, Any]:
    """The figures of a case, less those of the smaller one if it has one.

    Raises:
        NoCompiler: libtpu is not installed.
        NoDump: files are missing or have another layout.
    """
    sharding = _one_device(chip)
    found = _compile(case, sharding, dump)
    schedules, vmem = found
    cycles = sum(schedule.cycles for schedule in schedules)
    issued = sum(schedule.used.get("MXU", 0) for schedule in schedules)
    units = schedules[0].capacity.get("MXU", 0)
    weights, moved = case.weights, case.hbm_bytes
    if case.smaller is not None:
        less, _ = _compile(case.smaller, sharding, dump)
        cycles -= sum(schedule.cycles for schedule in less)
        issued -= sum(schedule.used.get("MXU", 0) for schedule in less)
        weights -= case.smaller.weights
        moved -= case.smaller.hbm_bytes
    figures = {
        "cycles": cycles,
        "mxu": issued / (units * cycles) if units and cycles > 0 else None,
        "spills": sum(schedule.spills for schedule in schedules),
        "vmem_bytes": vmem,
        "hbm_cycles": moved / chip.hbm_bytes_per_cycle if moved else None,
        "cycles_per_64k": cycles * 65536 / weights if weights else None,
    }
    return {name: figures[name] for name in FIGURES if figures[name] is not None}


def _one_device(chip: Tpu) -> NamedSharding:
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=chip.topology
        )
    except Exception as error:  # the plugin's own, and which one depends on its version
        raise NoCompiler(
            f"no TPU compiler: pip install 'jax[tpu]=={jax.__version__}'"
        ) from error
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    return NamedSharding(mesh, PartitionSpec())


def _compile(
    case: Case, sharding: NamedSharding, dump: pathlib.Path
) -> tuple[list[tpu_dump.Schedule], int | None]:
    """Schedules of the kernels, and the VMEM of the largest."""
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        case.arguments,
    )
    for file in dump.iterdir():
        file.unlink()
    compiled = jax.jit(case.function).lower(*arguments).compile()
    names = tpu_dump.kernel_names(compiled.as_text() or "")
    if not names:
        raise ValueError("there is no Pallas kernel in the compiled program")
    schedules = [_schedule(name, dump) for name in names]
    vmem = {}
    for file in dump.glob("*-vmem_report.html"):
        vmem |= tpu_dump.parse_vmem(file.read_text())
    return schedules, max((vmem[name] for name in names if name in vmem), default=None)


def _schedule(name: str, dump: pathlib.Path) -> tpu_dump.Schedule:
    ending = "-pre-delay_hlo-static-per-bundle-utilization.txt"
    files = [file for file in dump.iterdir() if file.name.endswith(ending)]
    files = [file for file in files if f"-{name}-" in file.name]
    if len(files) != 1:
        raise NoDump(f"{len(files)} files *-{name}-*{ending} from the compiler, not 1")
    try:
        return tpu_dump.parse_schedule(files[0].read_text())
    except ValueError as error:
        raise NoDump(f"{files[0].name}: {error}") from error
