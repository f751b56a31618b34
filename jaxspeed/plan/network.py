"""How long a collective takes on the links, and which links it keeps busy.

TPU chips form a grid or torus of two or three dims; where the mesh consists of devices
whose places in it are known, permutes are routed over it (the shortest way, one dim
after the other) and the busiest link counts. Otherwise each axis of the mesh stands
for a ring of its own. GPUs hang at a switch, which every collective shares. Whatever
leaves a slice or a host goes over the data center's network. Latency is not in it.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxspeed.chips import Chip
from jaxspeed.plan.groups import Groups

_SPREADING = ("all-to-all", "ragged-all-to-all")
# The two devices of a TPU7x chip: "six times faster than a 1D ICI link" (Cloud TPU
# documentation, TPU7x, dual-chiplet architecture).
_ON_CHIP_SPEEDUP = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """The use that one execution of a collective makes of the network.

    Attributes:
        links: numbers of the links that it uses, `[used]`.
        busy: seconds that each is in use, `[used]`.
    """

    links: np.ndarray
    busy: np.ndarray

    @property
    def seconds(self) -> float:
        """Its duration with the links to itself."""
        return float(self.busy.max())


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the devices of a program stand, and the links between them.

    The links are numbered: both directions of each dim at each place, then the switch,
    the data center's network and the connection inside a chip.

    Attributes:
        sizes: of the dims.
        rings: whether the ends of each dim are joined.
        places: `[devices, dims]`, in the program's order of devices.
        regions: `[devices]`, equal for devices that links connect.
    """

    sizes: tuple[int, ...]
    rings: tuple[bool, ...]
    places: np.ndarray
    regions: np.ndarray

    @property
    def num_links(self) -> int:
        """How many numbers for links there are."""
        return self._torus_links + 3

    @property
    def switch(self) -> int:
        """The number of the switch."""
        return self._torus_links

    @property
    def network(self) -> int:
        """The number of the data center's network."""
        return self._torus_links + 1

    @property
    def on_chip(self) -> int:
        """The number of the connection between devices of one chip."""
        return self._torus_links + 2

    @property
    def _torus_links(self) -> int:
        return 2 * len(self.sizes) * math.prod(self.sizes)

    def links_of(self, dims: list[int]) -> np.ndarray:
        """Numbers of all links along some dims."""
        numbers = np.arange(self._torus_links).reshape(-1, len(self.sizes), 2)
        return numbers[:, dims].reshape(-1)

    def way(self, source: int, target: int) -> Iterator[int]:
        """Numbers of the links from one device to another."""
        place = self.places[source].copy()
        for dim, direction, steps in self._steps(source, target):
            for _ in range(steps):
                chip = int(np.ravel_multi_index(tuple(place), self.sizes))
                yield 2 * (chip * len(self.sizes) + dim) + (direction < 0)
                place[dim] = (place[dim] + direction) % self.sizes[dim]

    def _steps(self, source: int, target: int) -> Iterator[tuple[int, int, int]]:
        """(dim, direction, steps) of the shortest way between two devices."""
        for dim, (size, ring) in enumerate(zip(self.sizes, self.rings, strict=True)):
            distance = int(self.places[target, dim] - self.places[source, dim])
            if ring and 2 * abs(distance) > size:
                distance -= size if distance > 0 else -size
            elif ring and 2 * distance == -size:
                distance = size // 2
            if distance:
                yield dim, (1 if distance > 0 else -1), abs(distance)


def grid_of(mesh: Mesh | AbstractMesh, chip: Chip) -> Grid:
    """The places of the devices of a mesh, in mesh order.

    Of a TPU topology the first dim is the slice, then come x, y and z.
    """
    devices = [] if isinstance(mesh, AbstractMesh) else list(mesh.devices.flat)
    region = "slice_index" if chip.torus_dims else "process_index"
    regions = np.array([getattr(each, region, None) or 0 for each in devices])
    coordinates = [getattr(each, "coords", None) for each in devices]
    if chip.torus_dims and devices and None not in coordinates:
        # Slices have the same coordinates: their number is one more.
        slices = np.unique(regions, return_inverse=True)[1]
        places = np.column_stack([slices, np.array(coordinates, int)])
        places -= places.min(axis=0)
        sizes = tuple(int(size) for size in places.max(axis=0) + 1)
        rings = (False, *(size % chip.ring_multiple == 0 for size in sizes[1:]))
        return Grid(sizes, rings, places, regions)
    sizes = tuple(mesh.shape.values())
    places = np.stack(np.unravel_index(np.arange(mesh.size), sizes), axis=1)
    return Grid(
        sizes=sizes,
        rings=(True,) * len(sizes),
        places=places,
        regions=regions if devices else np.zeros(mesh.size, int),
    )


def permute(grid: Grid, chip: Chip, pairs: Groups, num_bytes: int) -> Transfer:
    """Each source sends `num_bytes` to its target."""
    ends = np.array(pairs)
    if (grid.regions[ends[:, 0]] != grid.regions[ends[:, 1]]).any():
        return _over(grid.network, num_bytes / chip.network_bytes_per_second)
    if not chip.torus_dims:
        return _over(grid.switch, num_bytes / chip.link_bytes_per_second)
    ways = [link for pair in pairs for link in grid.way(*pair)]
    if not ways:
        return _on_chip(grid, chip, num_bytes)
    links, messages = np.unique(ways, return_counts=True)
    return Transfer(links, messages * num_bytes / chip.link_bytes_per_second)


def group_collective(
    grid: Grid, chip: Chip, op: str, groups: Groups, num_bytes: int
) -> Transfer:
    """Each device sends `num_bytes` in all to the others of its group.

    Gathers and reductions run in rings, or along lines where a dim is not closed, over
    all dims that the group spans at once. An all-to-all is bound by the links that
    halve the group.
    """
    group = np.array(groups[0])
    if len(set(grid.regions[group].tolist())) > 1:
        return _over(grid.network, num_bytes / chip.network_bytes_per_second)
    if not chip.torus_dims:
        return _over(grid.switch, num_bytes / chip.link_bytes_per_second)
    places = grid.places[group]
    sides = [len(set(along.tolist())) for along in places.T]
    dims = [dim for dim, side in enumerate(sides) if side > 1]
    if not dims:
        return _on_chip(grid, chip, num_bytes)
    share = _devices_on_a_chip(grid.places) / _devices_on_a_chip(places)
    rates = [
        chip.link_bytes_per_second / share * (2 if _ring(grid, dim, sides[dim]) else 1)
        for dim in dims
    ]
    seconds = num_bytes / sum(rates)
    if op in _SPREADING:
        # Half of the group sends to the other half, over the links of one cut.
        payload = num_bytes * len(group) / (len(group) - 1)
        seconds = max(
            payload * sides[dim] / 4 / rate
            for dim, rate in zip(dims, rates, strict=True)
        )
    links = grid.links_of(dims)
    return Transfer(links, np.full(len(links), seconds))


def _ring(grid: Grid, dim: int, side: int) -> bool:
    """Whether a group takes the whole of a dim whose ends are joined.

    Two places have one link between them, not two.
    """
    return grid.rings[dim] and side == grid.sizes[dim] and side > 2


def _devices_on_a_chip(places: np.ndarray) -> int:
    return int(np.unique(places, axis=0, return_counts=True)[1].max())


def _over(link: int, seconds: float) -> Transfer:
    return Transfer(np.array([link]), np.array([seconds]))


def _on_chip(grid: Grid, chip: Chip, num_bytes: int) -> Transfer:
    bytes_per_second = _ON_CHIP_SPEEDUP * chip.link_bytes_per_second
    return _over(grid.on_chip, num_bytes / bytes_per_second)
