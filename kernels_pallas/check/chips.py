"""The chips that kernels are compiled for, and what bounds them.

TPU clocks follow from the published peaks and the operations per cycle of the compiled
schedule; the bandwidth is the vendor's, per chip, of all of its cores.
"""

import dataclasses

BF16_FLOPS_PER_CYCLE = {"v5e": 131072, "v5p": 131072, "v6e": 524288, "tpu7x": 524288}
"""Of the matrix units of one core; a multiplication and an addition are two."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU generation.

    Attributes:
        name: as in the name of a topology.
        topology: the smallest one that the compiler knows.
        clock_hz: cycles per second.
        hbm_bytes_per_second: of a chip.
        cores: that share them.
    """

    name: str
    topology: str
    clock_hz: float
    hbm_bytes_per_second: float
    cores: int

    platform = "tpu"

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """Of one core."""
        return self.hbm_bytes_per_second / self.cores / self.clock_hz


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, as the compiler is told of it.

    Attributes:
        name: short.
        device: NVIDIA's name of it.
        architecture: of the machine code.
        cores: streaming multiprocessors.
        clock_ghz: boost clock.
        memory_bytes, l2_bytes, hbm_bytes_per_second: of the board.
    """

    name: str
    device: str
    architecture: str
    cores: int
    clock_ghz: float
    memory_bytes: int
    l2_bytes: int
    hbm_bytes_per_second: int

    platform = "gpu"

    @property
    def target(self) -> str:
        """The compiler's description of the chip: a text protocol buffer of XLA."""
        return _TARGET.format(**dataclasses.asdict(self))


# Limits of compute capability 9.0: CUDA C++ Programming Guide, "Compute Capabilities".
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {hbm_bytes_per_second} l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz} device_memory_size: {memory_bytes}
  cuda_compute_capability {{
    major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
  }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{device}"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{device}"
"""

_ALL = (
    Tpu("v5e", "v5e:2x2", 1.503e9, 820e9, cores=1),
    Tpu("v5p", "v5p:2x2x1", 1.751e9, 2460e9, cores=2),
    Tpu("v6e", "v6e:2x2", 1.751e9, 1640e9, cores=1),
    Tpu("tpu7x", "tpu7x:2x2x1", 2.2e9, 7400e9, cores=2),
    Gpu(
        name="h200",
        device="NVIDIA H200 141GB HBM3e",
        architecture="sm_90a",
        cores=132,
        clock_ghz=1.98,
        memory_bytes=141 * 2**30,
        l2_bytes=50 * 2**20,
        hbm_bytes_per_second=4800 * 10**9,
    ),
)

CHIPS: dict[str, Tpu | Gpu] = {chip.name: chip for chip in _ALL}
"""By name."""
