"""A program compiled to the machine code of a GPU that is not there, and counted.

Needs jax's CUDA plugin packages without what they depend on, and NVIDIA's disassembler:
no driver, no CUDA. Works only in a process that was started with `environment`, and for
one case in it: a kernel that is compiled again is not written again.
"""

import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.check import sass
from kernels_pallas.check.case import Case
from kernels_pallas.check.chips import Gpu
from kernels_pallas.check.result import NoCompiler, NoDump

FIGURES = {
    "instructions_per_weight": "issued in the inner loop",
    "loop_instructions": "of one pass of the inner loops, over the kernels",
    "registers": "per thread of the largest kernel, as compiled",
    "spill_bytes": "stored per thread for want of registers",
    "shared_bytes": "of shared memory, of the largest kernel",
    "tensor_core": "mnemonics: HGMMA 16-bit, QGMMA 8-bit float, IGMMA 8-bit int",
    "mix": "the inner loops' instructions by mnemonic",
}

WARPGROUP = 128
"""Threads that one instruction of a warpgroup is issued for."""


def environment(dump: str) -> dict[str, str]:
    """Variables of a process that compiles, and writes machine code into `dump`."""
    found = {
        "MOSAIC_GPU_DUMP_TO": dump,
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
    }
    tools = _disassembler()
    return found if tools is None else found | {"CUDA_ROOT": str(tools)}


def measure(case: Case, chip: Gpu, dump: pathlib.Path) -> dict[str, Any]:
    """The figures of a case.

    Raises:
        NoCompiler: the plugin or the disassembler is not installed.
        NoDump: files are missing or have another layout.
    """
    _compile(case, chip)
    try:
        reports = [sass.parse_report(x.read_text()) for x in dump.glob("*.ptxas")]
        codes = [sass.parse_code(x.read_text()) for x in dump.glob("*.sass*")]
        memory = [sass.parse_shared_memory(x.read_text()) for x in _passes(dump)]
    except ValueError as error:
        raise NoDump(str(error)) from error
    if not reports or len(reports) != len(codes):
        raise NoDump(
            f"{len(reports)} reports of ptxas and {len(codes)} listings of machine "
            "code, not one of each for every kernel"
        )
    loop = sum(len(code.loop) for code in codes)
    mix: dict[str, int] = {}
    for code in codes:
        mix |= {name: mix.get(name, 0) + count for name, count in code.mix.items()}
    found = {
        "loop_instructions": loop,
        "registers": max(report.registers for report in reports),
        "spill_bytes": sum(report.spill_bytes for report in reports),
        "tensor_core": sorted({name for code in codes for name in code.tensor_core}),
        "mix": mix,
    }
    if memory:
        found["shared_bytes"] = max(memory)
    if case.weights:
        found["instructions_per_weight"] = loop * WARPGROUP / case.weights
    return {name: found[name] for name in FIGURES if name in found}


def _compile(case: Case, chip: Gpu) -> None:
    if _disassembler() is None:
        raise NoCompiler("no disassembler: pip install nvidia-cuda-nvdisasm")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=chip.target, topology="1x1x1"
        )
    except Exception as error:  # the plugin's own, and which one depends on its version
        raise NoCompiler(
            f"no GPU compiler: pip install 'jax[cuda13-local]=={jax.__version__}'"
        ) from error
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        case.arguments,
    )
    with jax.set_mesh(mesh):  # a kernel may ask for the number of cores
        lowered = jax.jit(case.function).lower(*arguments)
        if "mosaic_gpu" not in lowered.as_text():
            raise ValueError("there is no Mosaic GPU kernel in the program")
        lowered.compile()


def _passes(dump: pathlib.Path) -> list[pathlib.Path]:
    return list(dump.glob("*.mlir-passes.log"))


def _disassembler() -> pathlib.Path | None:
    """The folder whose `bin` has nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for place in places:
        for tool in sorted(pathlib.Path(place).glob("*/bin/nvdisasm")):
            return tool.parent.parent
    return None
