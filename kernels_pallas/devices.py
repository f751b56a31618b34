"""Which kind of device a program is compiled for, as far as it can be known."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
"""In the names of GPUs whose machine code is sm_90a, such as "NVIDIA H100 PCIe"."""


def device_kind(x: Array) -> str:
    """The name of the device that a program of `x` is compiled for.

    That of the mesh around, or of the mesh that `x` is placed on, or of the default
    backend: of a program that is compiled for a device that is not there, without a
    mesh, nobody says which.
    """
    placed = getattr(jax.typeof(x).sharding, "mesh", None)
    for mesh in (jax.sharding.get_abstract_mesh(), placed):
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return device.device_kind
    return jax.devices()[0].device_kind


def hopper_candidate(
    implementation: str | None,
    x: Array,
    reason: str | None,
    function: Callable[..., Any],
) -> Callable[..., Any] | str:
    """The candidate "gpu" of `dispatch.run`, of a kernel for Hopper GPUs alone.

    Args:
        implementation: that was asked for. The platform is all that the choice at
            compilation goes by, and other GPUs share it: nobody gets the kernel by
            default unless the program is known to be for a Hopper GPU.
        x: an array of the program.
        reason: why the kernel cannot run on these arrays, or None.
        function: the kernel.
    """
    if reason is not None:
        return reason
    kind = device_kind(x)
    if implementation is None and not HOPPER.search(kind):
        return f"it is for Hopper GPUs (sm_90a), and the program is for {kind!r}"
    return function
