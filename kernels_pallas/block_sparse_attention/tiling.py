"""How a layout is cut into the tiles that the TPU kernels work on.

A tile is a block of queries times a block of keys, at least 128 of each. Layouts with
smaller blocks leave tiles partly empty, most of all where every fourth block, say, is
seen from everywhere: then each tile has something. So tokens may be put into another
order before the kernel, in which the blocks that are seen from everywhere are side by
side, and so are the queries that see everything.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from kernels_pallas.block_sparse_attention.pattern import Mask

TILES = (1024, 512, 256, 128)
BITS = 32
"""Cells along one side of a tile that a word can tell apart."""
SMALLEST_CELL = 8
"""Rows of a register: cells are told apart at no finer grain."""

STEP_SCORES = 2**17
"""What a pair of blocks costs beside its scores, in scores.

In the compiler's final schedule the three kernels together take, per pair of blocks, K
= 128: on v5p 1881 cycles for 128 x 128 and 5876 for 512 x 512, on v6e 2242 and 3768. So
a pair costs 99K scores on v5p, and 345K on v6e, whose matrix unit is half idle at 128.
Masks of cells add 2% at most, comparisons of tokens an eighth to a fourth.
"""

FINE_RATIO, FINE_COST = 1.25, 2.0
"""A tiling keeps to the layout if it computes at most so many scores for each listed.

It is taken if it costs at most so many times the least, by an estimate that leaves out
what is fetched for scores that are not listed.
"""

MOST_PAIRS = 2**16
"""Pairs of blocks that may be listed: 8 bytes each, in 1 MiB of scalar memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tiling:
    """Sizes of tiles, and the order of the tokens.

    Attributes:
        cell: tokens in a cell, the grain of the layout and of the order.
        query, key: tokens in a block of queries and of keys.
        query_order, key_order: which cell is where; None: as they are.
    """

    cell: int
    query: int
    key: int
    query_order: Int[np.ndarray, " n"] | None
    key_order: Int[np.ndarray, " n"] | None

    def arranged(self, cells: Bool[np.ndarray, "n n"]) -> Bool[np.ndarray, "n n"]:
        """`cells` in the order of the tokens."""
        if self.query_order is not None:
            cells = cells[self.query_order]
        return cells if self.key_order is None else cells[:, self.key_order]

    def split(self, cells: Bool[np.ndarray, "n n"]) -> Bool[np.ndarray, "I q J k"]:
        """Ordered `cells`, padded with empty ones, by block of queries and of keys."""
        sizes = self.query // self.cell, self.key // self.cell
        rows, columns = (math.ceil(len(cells) / size) * size for size in sizes)
        padded = np.zeros((rows, columns), bool)
        padded[: len(cells), : len(cells)] = cells
        return padded.reshape(rows // sizes[0], sizes[0], columns // sizes[1], sizes[1])


def refusal(mask: Mask, largest: int, repeats: int) -> str | None:
    """Why the TPU kernels cannot run with a layout, or None."""
    cell = math.gcd(mask.block, largest)
    if cell < SMALLEST_CELL:
        return f"a block of {mask.block} tokens is no multiple of {SMALLEST_CELL}"
    if choose(mask, largest, repeats) is None:
        return f"the layout has more than {MOST_PAIRS} pairs of blocks to list"
    return None


@functools.lru_cache(maxsize=64)
def choose(mask: Mask, largest: int, repeats: int) -> Tiling | None:
    """The tiling to use; None: none fits.

    The one that costs least, but a finer one that keeps to the layout, if there is one
    that does not cost much more.

    Args:
        mask: the layout.
        largest: tokens in the largest block allowed.
        repeats: query heads in a group. Where their layouts differ, the list of a block
            of keys has the pairs of all of them.
    """
    lists = len(mask.pattern.distinct)
    if not mask.pattern.alike(repeats):
        lists = len(mask.pattern.of_head)
    found = [
        each for each in _candidates(mask, largest) if each.most * lists <= MOST_PAIRS
    ]
    if not found:
        return None
    least = min(each.cost for each in found)
    fine = [each for each in found if each.keeps_to_layout(least)]
    return min(fine or found, key=lambda each: each.cost).tiling


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A tiling.

    Attributes:
        tiling: what it is.
        cost: in scores.
        ratio: scores computed for each one that is listed.
        most: pairs of blocks that a layout has, at most.
    """

    tiling: Tiling
    cost: float
    ratio: float
    most: int

    def keeps_to_layout(self, least: float) -> bool:
        """Whether it does, and costs little more than `least`."""
        return self.ratio <= FINE_RATIO and self.cost <= FINE_COST * least


def _candidates(mask: Mask, largest: int) -> Iterator[_Candidate]:
    cell = math.gcd(mask.block, largest)
    layouts = [mask.cells(i, cell) for i in range(len(mask.pattern.distinct))]
    heads = np.bincount(mask.pattern.of_head, minlength=len(layouts))
    wanted = np.dot(heads, [x.sum() for x in layouts]) * cell**2
    sizes = _sizes(mask.length, cell, largest)
    for orders in _orders(layouts, mask.causal):
        base = Tiling(cell, max(cell, 128), max(cell, 128), *orders)
        covered = [_any(base.split(base.arranged(x))) for x in layouts]
        for query, key in itertools.product(sizes, sizes):
            pairs = [_folded(x, query // base.query, key // base.key) for x in covered]
            count, scores = np.dot(heads, pairs), query * key
            yield _Candidate(
                dataclasses.replace(base, query=query, key=key),
                cost=count * (scores + STEP_SCORES),
                ratio=count * scores / max(wanted, 1),
                most=max(pairs),
            )


def _sizes(length: int, cell: int, largest: int) -> list[int]:
    """Sizes of blocks that fit cells, and are no longer than the sequence needs."""
    smallest = max(cell, 128)
    return [
        size
        for size in TILES
        if smallest <= size <= max(largest, smallest)
        and size // cell <= BITS
        and (size == smallest or size < 2 * length)
    ]


def _orders(layouts: list[Bool[np.ndarray, "n n"]], causal: bool) -> list[tuple]:
    """Orders (of queries, of keys) worth trying."""
    queries = [None, _clustered([cells.T for cells in layouts], None)]
    keys = [None, _clustered(layouts, causal)]
    found = itertools.product(queries, keys)
    return [(None, None)] + [
        each for each in found if any(order is not None for order in each)
    ]


def _clustered(
    layouts: list[Bool[np.ndarray, "n n"]], causal: bool | None
) -> Int[np.ndarray, " n"] | None:
    """An order of the columns with those that most rows see side by side.

    Columns that are seen from everywhere in the same layouts are together. None if
    there are none.
    """
    count = len(layouts[0])
    rows = count - np.arange(count) if causal else np.full(count, count)
    seen = np.array([cells.sum(axis=0) for cells in layouts])
    usual = np.median(seen, axis=1, keepdims=True)
    everywhere = (seen > rows / 2) & (seen > 4 * usual)
    if not everywhere.any():
        return None
    return np.lexsort(everywhere)


def _folded(covered: Bool[np.ndarray, "I J"], rows: int, columns: int) -> int:
    """How many blocks of `rows` x `columns` of `covered` have anything."""
    height, width = (
        math.ceil(length / size) * size
        for length, size in zip(covered.shape, (rows, columns), strict=True)
    )
    padded = np.zeros((height, width), bool)
    padded[: covered.shape[0], : covered.shape[1]] = covered
    tiles = padded.reshape(height // rows, rows, width // columns, columns)
    return int(_any(tiles).sum())


def _any(tiles: Bool[np.ndarray, "I q J k"]) -> Bool[np.ndarray, "I J"]:
    return np.asarray(tiles.any(axis=(1, 3)))
