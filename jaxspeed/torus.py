"""Which TPU device stands where in a mesh, such that its rings lie along the torus.

`rings.factor` makes a mesh axis of one ring if it has few devices, else of several.
Every ring gets a box of the torus: a part of each of its sides. It costs least where
neighbours in it are neighbours on the torus, so of all ways to cut the torus into boxes
the one with the fewest links between neighbours is taken. `jax.make_mesh` numbers
devices row by row.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxspeed.chips import Chip
from jaxspeed.rings import factor

Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Torus:
    """A box of TPU chips.

    Attributes:
        sides: chips along each dim.
        per_chip: devices of one chip.
        closed: which sides are joined at their ends, for messages.
        straight: whether messages keep to `Chip.straight_beyond`.
    """

    sides: Place
    per_chip: int
    closed: tuple[bool, ...]
    straight: bool

    def links(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Links between chips; the last dim of both arrays is their place."""
        return self._apart(sources, targets).sum(axis=-1)

    def stops(self, sources: np.ndarray, targets: np.ndarray) -> bool:
        """Whether any of the messages stops computation while it is sent."""
        if not self.straight:
            return False
        apart = self._apart(sources, targets)
        bent = (apart > 0).sum(axis=-1) > 1
        return bool((bent | ~np.isin(apart.sum(axis=-1), (0, 1, 2, 4, 8))).any())

    def _apart(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        apart = np.abs(sources - targets)
        return np.where(self.closed, np.minimum(apart, self.sides - apart), apart)


def torus_order(
    devices: Sequence[Any], sizes: Sequence[int], chip: Chip
) -> np.ndarray | None:
    """Devices as an array of shape `sizes`; None if it is not known how.

    Args:
        devices: with `coords`, all of a box of TPU chips.
        sizes: of the mesh axes, the first varying slowest.
        chip: what the devices are.
    """
    found = _torus(devices, chip)
    if found is None:
        return None
    torus, on_chip = found
    rings = [ring.size for ring in reversed(factor(sizes, chip.torus_dims))]
    best = min(
        _arrangements(torus, rings),
        key=lambda places: _cost(torus, places[..., :-1]),
        default=None,
    )
    if best is None:
        return None
    order = np.empty(len(devices), dtype=object)
    for index, (*place, core) in enumerate(best.reshape(len(devices), -1).tolist()):
        order[index] = on_chip[tuple(place)][core]
    return order.reshape(sizes)


def _torus(
    devices: Sequence[Any], chip: Chip
) -> tuple[Torus, dict[Place, list[Any]]] | None:
    """The box that the devices fill, and those of each chip; None if they do not."""
    places = np.array([getattr(device, "coords", ()) for device in devices])
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if not places.size or places.min() or len(slices) > 1:
        return None
    sides = tuple(int(side) + 1 for side in places.max(axis=0))
    on_chip: dict[Place, list[Any]] = {}
    for device, place in zip(devices, places.tolist(), strict=True):
        on_chip.setdefault(tuple(place), []).append(device)
    per_chip = len(devices) // math.prod(sides)
    if any(len(cores) != per_chip for cores in on_chip.values()):
        return None
    if len(on_chip) != math.prod(sides):
        return None
    straight = 0 < chip.straight_beyond < len(on_chip)
    closed = tuple(not straight and side % chip.ring_multiple == 0 for side in sides)
    return Torus(sides, per_chip, closed, straight), on_chip


def _arrangements(torus: Torus, rings: list[int]) -> Iterator[np.ndarray]:
    """Every way to give each ring a box: the place (x, y, z, core) of each index.

    Along a side that rings share, the last ring has neighbours. The others step over
    its part; with every second of their steps mirrored, those at its ends do not.

    Args:
        torus: all of it.
        rings: their sizes, the one that varies slowest first.
    """
    whole = (*torus.sides, torus.per_chip)
    for boxes in _boxes(whole, rings):
        ways, outer = [], np.ones(len(torus.sides), dtype=int)
        for box in boxes:
            # Steps over all of a closed side come back; those over a part do not.
            lines = tuple(~np.array(torus.closed) | (outer > 1))
            ways.append(_walk(box[:-1], box[-1], lines))
            outer *= box[:-1]
        yield _combine(boxes, ways, mirrored=False)
        if any(_shared(boxes)):
            yield _combine(boxes, ways, mirrored=True)


def _shared(boxes: list[Place]) -> Iterator[bool]:
    """For each side, whether more than one box has a part of it."""
    for parts in zip(*boxes, strict=True):
        yield sum(part > 1 for part in parts) > 1


def _boxes(whole: Place, rings: list[int]) -> Iterator[list[Place]]:
    """Every cut of a box into boxes of so many devices, one for each ring."""
    if not rings:
        if math.prod(whole) == 1:
            yield []
        return
    for box in itertools.product(*(_divisors(side) for side in whole)):
        if math.prod(box) == rings[0]:
            rest = tuple(side // part for side, part in zip(whole, box, strict=True))
            for boxes in _boxes(rest, rings[1:]):
                yield [box, *boxes]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _combine(boxes: list[Place], ways: list[np.ndarray], mirrored: bool) -> np.ndarray:
    """Places in the torus, `[*rings, dims]`, from the places in each ring's box."""
    total = np.zeros(4, dtype=int)
    for box, way in zip(boxes, ways, strict=True):
        before, sides = total[..., None, :], np.array(box)
        inner = np.where(before % 2 == 1, sides - 1 - way, way) if mirrored else way
        total = before * sides + inner
    return total


def _cost(torus: Torus, places: np.ndarray) -> tuple[int, float, int]:
    """Rings with messages that stop computation, links per message, and the most.

    Links are means of each ring, summed over the rings.
    """
    stops, total, most = 0, 0.0, 0
    for ring in range(places.ndim - 1):
        following = np.roll(places, -1, axis=ring)
        links = torus.links(places, following)
        stops += torus.stops(places, following)
        total += float(links.mean())
        most = max(most, int(links.max()))
    return stops, total, most


@functools.cache
def _walk(sides: Place, per_chip: int, lines: tuple[bool, ...]) -> np.ndarray:
    """All devices of a ring in order: their places in its box, and on their chip.

    Args:
        sides: of the box.
        per_chip: devices of a chip.
        lines: which sides have ends that are not joined.
    """
    way = _cycle(sides)
    if way is None:
        folded = (
            _folded(side) if line else range(side)
            for side, line in zip(sides, lines, strict=True)
        )
        way = list(itertools.product(*folded))
    return np.array([(*place, core) for place in way for core in range(per_chip)])


def _folded(length: int) -> list[int]:
    """A line there and back, each time over every second place: no step is over two."""
    return [*range(0, length, 2), *reversed(range(1, length, 2))]


def _cycle(sides: Sequence[int]) -> list[Place] | None:
    """A way through all chips, the last beside the first; None where none is known.

    With a side of two: back and forth along the other sides, and back on the second
    half. In a plane with an even side: back and forth, all but the first column, which
    is the way back.
    """
    plane = [dim for dim, side in enumerate(sides) if side > 1]
    even = [dim for dim in plane if sides[dim] % 2 == 0]
    if 2 in sides:
        first = sides.index(2)
        dims = [first, *(dim for dim in range(len(sides)) if dim != first)]
        way = _snake([range(sides[dim]) for dim in dims])
    elif len(plane) == 2 and even:
        dims = [even[0], *(dim for dim in plane if dim != even[0])]
        rows, columns = (range(sides[dim]) for dim in dims)
        way = _snake([rows, columns[1:]])
        way += [(row, 0) for row in reversed(rows)]
    else:
        return None
    at = [dict(zip(dims, place, strict=True)) for place in way]
    return [tuple(place.get(dim, 0) for dim in range(len(sides))) for place in at]


def _snake(sides: Sequence[range]) -> list[Place]:
    """All places, each beside the one before it; the first dim varies slowest."""
    way: list[Place] = [()]
    for side in sides:
        way = [
            (*before, step)
            for number, before in enumerate(way)
            for step in (side if number % 2 == 0 else reversed(side))
        ]
    return way
