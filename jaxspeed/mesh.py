"""The one device mesh: six named axes, slowest link first.

All six axes always exist; an unused one has size 1, so no code asks whether a
strategy is on. "Axis" always means a mesh axis, "dim" a dimension of an array.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxspeed.chips import chip_of
from jaxspeed.torus import torus_order

AXES = ("pipe", "replica", "data", "expert", "seq", "tensor")
BATCH_AXES = ("replica", "data", "expert")
"""Axes over which the batch is split; they hold different samples."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the six mesh axes. At most one may be -1: it takes what is left."""

    pipe: int = 1
    replica: int = 1
    data: int = -1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(
                    f"mesh axis {axis!r} has size {size}; give a positive size, or "
                    "-1 for all devices that the other axes leave"
                )
        if list(sizes.values()).count(-1) > 1:
            open_axes = [axis for axis, size in sizes.items() if size == -1]
            raise ValueError(f"only one mesh axis may be -1, not {open_axes}")

    def resolve(self, num_devices: int) -> "MeshShape":
        """The same shape with its -1 replaced, checked against `num_devices`."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        named = {axis: size for axis, size in sizes.items() if size not in (1, -1)}
        if open_axes and num_devices % fixed == 0:
            return dataclasses.replace(self, **{open_axes[0]: num_devices // fixed})
        if not open_axes and fixed == num_devices:
            return self
        if open_axes:
            problem = f"their product {fixed} does not divide {num_devices} devices"
        else:
            problem = f"their product is {fixed}, but there are {num_devices} devices"
        raise ValueError(
            f"mesh axes {named}: {problem}. Change a size, let one axis be -1 (it "
            "takes what is left), or pass devices=jax.devices()[:n] to use only some"
        )


def make_mesh(
    shape: MeshShape | None = None,
    *,
    devices: Sequence[Any] | None = None,
    **sizes: int,
) -> Mesh:
    """The device mesh with all six axes.

    Args:
        shape: axis sizes as a record; or give them by name, `make_mesh(tensor=2)`.
            `data` defaults to -1: all devices that the other axes leave.
        devices: the devices to use; all of them by default.

    Raises:
        ValueError: an unknown axis, or sizes that do not fit the devices.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; the axes are {AXES}")
    if shape is None:
        shape = MeshShape(**sizes)
    elif sizes:
        raise ValueError("give the mesh either as a MeshShape or by axis names")
    devices = list(jax.devices() if devices is None else devices)
    resolved = shape.resolve(len(devices))
    axis_sizes = tuple(getattr(resolved, axis) for axis in AXES)
    axis_types = (AxisType.Auto,) * len(AXES)
    chip = chip_of(devices[0])
    grid = None
    if chip is not None and chip.torus_dims:
        grid = torus_order(devices, axis_sizes, chip)
    if grid is None:
        # An axis may be a part of a side of the torus: two of the four in v5p:4x4x4.
        grid = mesh_utils.create_device_mesh(
            axis_sizes, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=axis_types)


def settle(results: Any, mesh: Mesh) -> Any:
    """`results` of a program over `mesh`, waited for where devices are simulated.

    Programs on CPU devices share one pool of threads, and a collective holds a thread
    per device until all have come: with two programs in flight each can wait for
    threads that the other holds, forever. On TPU and GPU nothing is waited for.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        return jax.block_until_ready(results)
    return results
