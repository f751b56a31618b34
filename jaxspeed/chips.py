"""What one device can do: memory, arithmetic and links of the chips that are known.

Figures are peaks of one JAX device (two devices share a TPU7x chip), as published by
the vendor; they bound a program's time and measure nothing.
"""

import dataclasses
from typing import Any

GIB = 2**30

GPUS_PER_HOST = 8
"""GPUs on one NVLink switch."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device.

    Attributes:
        name: generation, as in the name of a topology.
        hbm_bytes: device memory.
        usable_hbm_bytes: what the compiler lets a program use of it; on a GPU, where
            the compiler sets no limit, all of it.
        bf16_flops: dense bfloat16 operations per second (a multiplication and an
            addition are two).
        hbm_bytes_per_second: reading and writing together.
        link_bytes_per_second: one direction of one link between neighbours in the
            torus of a TPU; of all links to the switch of a GPU.
        torus_dims: dims of the torus, each with two links; 0 for devices at a switch.
        network_bytes_per_second: sent to devices that the links do not reach, through
            the data center's network.
        ring_multiple: a side of the torus that is a multiple of this is closed to a
            ring, any other is a line; 0 at a switch.
        straight_beyond: in topologies of more chips than this the compiler sends
            asynchronously only along one side, not over its closed end, and over 1, 2,
            4 or 8 links ("limited ICI routing"; found by compiling); 0: anywhere.
    """

    name: str
    hbm_bytes: int
    usable_hbm_bytes: int
    bf16_flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    torus_dims: int
    network_bytes_per_second: float
    ring_multiple: int = 0
    straight_beyond: int = 0

    @property
    def links(self) -> int:
        """Link directions out of the device that can be in use at once."""
        return max(1, 2 * self.torus_dims)


# TPU rows: "Key specifications" of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x},
# per chip. Published link bandwidth counts both directions of all links: 400 GB/s over
# 4 links (v5e), 1200 over 6 (v5p, TPU7x), 800 over 4 (v6e), so 50, 100, 100 and 100
# GB/s for one direction of one link. Usable memory is what libtpu 0.0.52 names when it
# refuses a program ("exceeds available HBM (15.75G)"). Sides of 16 close to a ring on
# v5e and v6e, multiples of 4 on v5p and TPU7x, whose cubes of 4x4x4 are joined by
# optical switches.
# GPU rows: NVIDIA's data sheets of the SXM boards, dense (without sparsity); NVLink 3
# and 4 are published as 600 and 900 GB/s of both directions; one network adapter of
# 200 (A100) or 400 Gbit/s per GPU, as in DGX systems.
_CHIPS = (
    Chip(
        name="v5e",
        hbm_bytes=16 * GIB,
        usable_hbm_bytes=int(15.75 * GIB),
        bf16_flops=197e12,
        hbm_bytes_per_second=819e9,
        link_bytes_per_second=50e9,
        torus_dims=2,
        network_bytes_per_second=6.4e12 / 8 / 256,
        ring_multiple=16,
        straight_beyond=16,
    ),
    Chip(
        name="v5p",
        hbm_bytes=96 * GIB,  # published as 95, of which the compiler uses 95.74
        usable_hbm_bytes=int(95.74 * GIB),
        bf16_flops=459e12,
        hbm_bytes_per_second=2765e9,
        link_bytes_per_second=100e9,
        torus_dims=3,
        network_bytes_per_second=50e9 / 8,
        ring_multiple=4,
    ),
    Chip(
        name="v6e",
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(31.25 * GIB),
        bf16_flops=918e12,
        hbm_bytes_per_second=1638e9,
        link_bytes_per_second=100e9,
        torus_dims=2,
        network_bytes_per_second=100e9 / 8,
        ring_multiple=16,
    ),
    Chip(
        name="tpu7x",
        hbm_bytes=96 * GIB,
        usable_hbm_bytes=int(94.75 * GIB),
        bf16_flops=2307e12 / 2,
        hbm_bytes_per_second=7380e9 / 2,
        link_bytes_per_second=100e9,
        torus_dims=3,
        network_bytes_per_second=100e9 / 8 / 2,
        ring_multiple=4,
    ),
    Chip(
        name="a100",
        hbm_bytes=80 * GIB,
        usable_hbm_bytes=80 * GIB,
        bf16_flops=312e12,
        hbm_bytes_per_second=2039e9,
        link_bytes_per_second=300e9,
        torus_dims=0,
        network_bytes_per_second=25e9,
    ),
    Chip(
        name="h100",
        hbm_bytes=80 * GIB,
        usable_hbm_bytes=80 * GIB,
        bf16_flops=989e12,
        hbm_bytes_per_second=3350e9,
        link_bytes_per_second=450e9,
        torus_dims=0,
        network_bytes_per_second=50e9,
    ),
    Chip(
        name="h200",
        hbm_bytes=141 * 10**9,
        usable_hbm_bytes=141 * 10**9,
        bf16_flops=989e12,
        hbm_bytes_per_second=4800e9,
        link_bytes_per_second=450e9,
        torus_dims=0,
        network_bytes_per_second=50e9,
    ),
)
CHIPS = {chip.name: chip for chip in _CHIPS}
"""The chips that are known, by generation."""

# `device_kind` as libtpu and the CUDA plugin give it, without the memory size and the
# board ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3").
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H200 141GB HBM3e": "h200",
}


def chip_of(device: Any) -> Chip | None:
    """The figures of a device; None for one that is not known, such as a CPU.

    Args:
        device: a `jax.Device`, real or of a topology described without hardware.
    """
    return CHIPS.get(_KINDS.get(device.device_kind, ""))
