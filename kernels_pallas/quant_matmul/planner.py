"""Which blocks the TPU kernel works on: those that a model of the chip likes best."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from kernels_pallas.quant_matmul.chips import Chip
from kernels_pallas.quant_matmul.layouts import BLOCK, LANES

STEP_SECONDS = 0.35e-6
"""What a grid step costs beside its work."""
CYCLES_PER_WEIGHTS = 16 / 65536
"""To read a weight into the matrix unit, at least; measured in compiled schedules."""
MOST_WEIGHTS = 2**22
"""Of a block: its work is unrolled, and the compiler's time grows with it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product [M, K] times [K, N].

    Attributes:
        rows, depth, columns: M, padded K and padded N.
        bits: of a weight, scales included.
        group: rows of a scale, or None.
        out_bytes: of a number of the result.
    """

    rows: int
    depth: int
    columns: int
    bits: float
    group: int | None
    out_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Blocks of M, K and N.

    Attributes:
        rows, depth, columns: of a block. `depth` divides K and holds whole groups.
        whole_x: the rows of x are in VMEM with all of K, and are fetched once.
        dot: rows of weights that are multiplied at once.
        scales_weights: scales of small groups are multiplied with the weights, not
            with products.
    """

    rows: int
    depth: int
    columns: int
    whole_x: bool
    dot: int
    scales_weights: bool


def plan(problem: Problem, chip: Chip) -> Plan:
    """The plan of the least modelled time among those that fit."""
    fitting = [each for each in _plans(problem) if _vmem(problem, each) <= chip.vmem]
    return min(fitting, key=lambda each: seconds(problem, each, chip))


def _plans(problem: Problem) -> Iterator[Plan]:
    unit = math.lcm(BLOCK, problem.group or 1)
    units = problem.depth // unit
    depths = [unit * n for n in range(1, units + 1) if units % n == 0]
    columns = sorted({min(n * LANES, problem.columns) for n in (1, 2, 4, 8, 16)})
    for rows, depth, width in itertools.product(_rows(problem.rows), depths, columns):
        small = depth == unit and width <= 2 * LANES
        if depth * width > MOST_WEIGHTS and not small:
            continue
        dot, scales_weights = dot_of(rows, depth, problem.group)
        for whole_x in (True, False):
            yield Plan(rows, depth, width, whole_x, dot, scales_weights)


def _rows(rows: int) -> list[int]:
    """Sizes of blocks of x: all of few rows, else even parts."""
    if rows <= 2 * LANES:
        return [rows]
    parts = {math.ceil(rows / most) for most in (256, 512, 1024)}
    return sorted({math.ceil(rows / count / 32) * 32 for count in parts})


def dot_of(rows: int, depth: int, group: int | None) -> tuple[int, bool]:
    """Rows of weights in a dot, and whether their scales are multiplied before it.

    A scale of few rows costs rows of x if it is multiplied after the dot, and an
    unpacking of the weights to 16 bits if before: up to 16 rows, the former is less.
    """
    if group is not None and group < LANES:
        return (group, False) if rows <= 16 else (BLOCK, True)
    if group is not None:
        return min(group, BLOCK), False
    return (BLOCK if rows <= LANES else depth), False


def _vmem(problem: Problem, each: Plan) -> float:
    """Bytes: blocks twice, the sums, and unpacked weights where a dot needs many."""
    x = 2 * each.rows * (problem.depth if each.whole_x else each.depth)
    weights = each.depth * each.columns
    out = each.rows * each.columns
    unpacked = each.columns * max(each.dot, BLOCK) * (2 if each.scales_weights else 1)
    # Products are added up before they are added to the sums.
    sums = 2 * 4 * out
    blocks = x + weights * problem.bits / 8 + problem.out_bytes * out
    return 2 * blocks + sums + unpacked


def seconds(problem: Problem, each: Plan, chip: Chip) -> float:
    """Steps overlap their transfers; the first block of weights is waited for."""
    row_blocks = math.ceil(problem.rows / each.rows)
    column_blocks = math.ceil(problem.columns / each.columns)
    depth_blocks = problem.depth // each.depth
    steps = row_blocks * column_blocks * depth_blocks
    weights = each.depth * each.columns
    weight_bytes = weights * problem.bits / 8
    x_bytes = 2 * each.rows * each.depth / (column_blocks if each.whole_x else 1)
    out_bytes = problem.out_bytes * each.rows * each.columns / depth_blocks
    moved = (weight_bytes + x_bytes + out_bytes) / chip.bandwidth
    cycles = weights * max(CYCLES_PER_WEIGHTS, each.rows / chip.multiplies)
    # Every step adds its products to the sums: a read and a write of a vector register.
    cycles += each.rows * each.columns / 1024
    step = max(moved, cycles / chip.clock + STEP_SECONDS)
    return steps * step + weight_bytes / chip.bandwidth
