"""What a plan needs to know of a TPU generation, and which one a program is for."""

import dataclasses

from jaxtyping import Array

from kernels_pallas.devices import device_kind


@dataclasses.dataclass(frozen=True)
class Chip:
    """One core of a chip.

    Attributes:
        bandwidth: bytes per second from HBM.
        clock: cycles per second.
        multiplies: bfloat16 multiply-adds per cycle.
        vmem: bytes that a plan may take.
        vmem_limit: bytes that the compiler may take: what it keeps beside of blocks and
            sums is not known before, but less than the difference.
        has_e4m3fn: whether the matrix unit reads e4m3fn; if not it reads the bits as
            e4m3b11fnuz, which are the number times 2**-4, for half of the cost.
    """

    bandwidth: float
    clock: float
    multiplies: int
    vmem: int
    vmem_limit: int
    has_e4m3fn: bool


MIB = 2**20
# Bandwidths and clocks as published; multiply-adds as the compiler schedules them.
V5E = Chip(820e9, 1.503e9, 65536, 16 * MIB, 40 * MIB, False)
V5P = Chip(1230e9, 1.751e9, 65536, 16 * MIB, 40 * MIB, False)
V6E = Chip(1640e9, 1.751e9, 262144, 24 * MIB, 48 * MIB, False)
TPU7X = Chip(3700e9, 2.2e9, 262144, 24 * MIB, 48 * MIB, True)

KINDS = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": TPU7X,
}
UNKNOWN = dataclasses.replace(V5E, bandwidth=1640e9, has_e4m3fn=True)
"""What runs on all of them: the least VMEM, and the formats that all have."""


def chip_of(x: Array) -> Chip:
    """The chip that a program of `x` is compiled for, as far as it can be known."""
    return KINDS.get(device_kind(x), UNKNOWN)
