"""The order of TPU devices on a mesh axis, such that its rings lie along the torus.

`rings.factor` makes an axis of n devices of one ring if they are few, else of a ring
per dim of the torus, the largest fastest. A ring costs least where neighbours in it are
neighbours on the torus; `jax.make_mesh` numbers devices row by row, whatever is done
with them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxspeed.rings import LARGEST_GROUP

Place = tuple[int, ...]


def torus_order(devices: Sequence[Any]) -> list[Any] | None:
    """Devices in the order of an axis that has all of them; None if unknown which.

    Args:
        devices: with `coords`, all of a box of TPU chips.
    """
    places = np.array([getattr(device, "coords", ()) for device in devices])
    if not places.size or places.min():
        return None
    sides = tuple(int(side) + 1 for side in places.max(axis=0))
    on_chip: dict[Place, list[Any]] = {}
    for device, place in zip(devices, places.tolist(), strict=True):
        on_chip.setdefault(tuple(place), []).append(device)
    per_chip = len(devices) // math.prod(sides)
    if any(len(chip) != per_chip for chip in on_chip.values()) or len(devices) < 4:
        return None
    if len(on_chip) != math.prod(sides):
        return None
    if len(devices) <= LARGEST_GROUP:
        cycle = _cycle(sides)
        return cycle and [device for place in cycle for device in on_chip[place]]
    return [on_chip[place][core] for place, core in _grid(sides, per_chip)]


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


def _grid(sides: Sequence[int], per_chip: int) -> Iterable[tuple[Place, int]]:
    """Places row by row, the largest side fastest.

    Two devices of a chip are two layers of its smallest side: along the first and back
    along the second.
    """
    smallest = sides.index(min(sides))
    lengths = list(sides)
    lengths[smallest] *= per_chip
    dims = sorted(range(len(sides)), key=lambda dim: lengths[dim])
    for index in np.ndindex(*(lengths[dim] for dim in dims)):
        place = [index[dims.index(dim)] for dim in range(len(sides))]
        core, along = divmod(place[smallest], sides[smallest])
        back = core % 2
        place[smallest] = sides[smallest] - 1 - along if back else along
        yield tuple(place), core


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
