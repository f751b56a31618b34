"""Sizes of tiles, from a model of what a tile moves and computes."""

import dataclasses
import itertools
from collections.abc import Iterable

from kernels_pallas.grouped_matmul import schedule

LANES = 128
VMEM = 13 * 2**20
"""Bytes that tiles may take: the default limit of v5e and v5p is 16 MiB."""
FLOPS_PER_BYTE = 300
"""At which a chip is as fast at bfloat16 matmuls as at reading: 187 v5p to 560 v6e."""
STEP_FLOPS = 10**8
"""What a chip could compute in the fixed cost of a grid step, about a third of a μs."""
LEAST_ROWS = 128
"""A tile of fewer rows takes as long: loading the weights is what it waits for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One product x[rows, depth] w[groups, depth, columns] and its bytes per number."""

    rows: int
    depth: int
    columns: int
    groups: int
    itemsize: int

    @property
    def flops(self) -> int:
        """Of the product itself, the group borders not counted."""
        return 2 * self.rows * self.depth * self.columns

    @property
    def bytes(self) -> int:
        """Every operand and the result once."""
        weights = self.groups * self.depth * self.columns
        vectors = self.rows * (self.depth + self.columns)
        return (weights + vectors) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows, depth and columns that one grid step works on."""

    rows: int
    depth: int
    columns: int


def product_tiles(sizes: Sizes) -> Tiles:
    """Tiles of a grouped product: rows and columns of the result stay, depth runs."""

    def vmem(tiles: Tiles) -> int:
        operands = (tiles.rows + tiles.columns) * tiles.depth
        result = tiles.rows * tiles.columns
        return 2 * sizes.itemsize * (operands + result) + 4 * result

    def cost(tiles: Tiles) -> float:
        steps = schedule.step_bound(sizes.rows, tiles.rows, sizes.groups)
        # With the whole depth in one tile the weights stay for all tiles of a group.
        whole = tiles.depth == sizes.depth
        weights = (sizes.groups if whole else steps) * sizes.depth * sizes.columns
        inputs = steps * tiles.rows * sizes.depth * _count(sizes.columns, tiles.columns)
        moved = (weights + inputs + sizes.rows * sizes.columns) * sizes.itemsize
        return _time(sizes, tiles, steps, moved)

    return _best(_candidates(sizes), vmem, cost)


def weight_tiles(sizes: Sizes) -> Tiles:
    """Tiles of a weight gradient: depth and columns of the result stay, rows run."""

    def vmem(tiles: Tiles) -> int:
        operands = tiles.rows * (tiles.depth + tiles.columns)
        result = tiles.depth * tiles.columns
        return 2 * sizes.itemsize * (operands + result) + 4 * result

    def cost(tiles: Tiles) -> float:
        steps = schedule.step_bound(sizes.rows, tiles.rows, sizes.groups)
        inputs = sizes.depth * _count(sizes.columns, tiles.columns)
        inputs += sizes.columns * _count(sizes.depth, tiles.depth)
        result = sizes.groups * sizes.depth * sizes.columns
        moved = (steps * tiles.rows * inputs + result) * sizes.itemsize
        return _time(sizes, tiles, steps, moved)

    return _best(_candidates(sizes), vmem, cost)


def _candidates(sizes: Sizes) -> Iterable[Tiles]:
    return itertools.starmap(
        Tiles,
        itertools.product(
            _choices(sizes.rows, (32, 64, 128, 256, 512)),
            _choices(sizes.depth, (512, 1024, 2048)),
            _choices(sizes.columns, (256, 512, 1024, 2048)),
        ),
    )


def _choices(size: int, options: tuple[int, ...]) -> list[int]:
    """Tiles of a dim: parts of it, or all of it, which needs no multiple of anything.

    The smallest part is always there, so that something fits whatever the size.
    """
    parts = [each for each in options if each < size]
    return [*parts, size] if size <= 8192 or not parts else parts


def _best(candidates: Iterable[Tiles], vmem, cost) -> Tiles:
    return min((each for each in candidates if vmem(each) <= VMEM), key=cost)


def _time(sizes: Sizes, tiles: Tiles, steps: int, moved: int) -> float:
    """In flops: the larger of computing and moving, and what every step costs."""
    width = _count(sizes.columns, tiles.columns) * tiles.columns
    depth = _count(sizes.depth, tiles.depth) * tiles.depth
    computed = 2 * steps * max(tiles.rows, LEAST_ROWS) * width * depth
    grid = steps * width * depth // (tiles.columns * tiles.depth)
    return max(computed, moved * FLOPS_PER_BYTE) + grid * STEP_FLOPS


def _count(size: int, tile: int) -> int:
    return -(-size // tile)
