"""Which part of a product a program of the GPU kernel has."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp

from kernels_pallas.gpu_ring import COMPUTING
from kernels_pallas.quant_matmul.gpu_words import TILE
from kernels_pallas.quant_matmul.layouts import BLOCK

CORES = 132
"""Streaming multiprocessors of a H100 or H200; one program runs on each at a time."""
SHARED_BYTES = 224 * 1024
"""Of a program, less than the 227 KiB that there are, for barriers."""
TOKENS = tuple(range(8, 65, 8))
"""What a program may have: what the tensor core multiplies with at once."""
INTEGER_TOKENS = (8, 16, 24, 32, 48, 64)
"""The same of integers (PTX ISA 8.0, section "wgmma.mma_async")."""
LEAST_STAGES = 2
"""With one, a copy waits for the product before it."""
MOST_STAGES = 6
SHARED_BY_ALL = 0.5
"""Cost of a byte that the cache has, over that of one that it has not."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product [M, K] times [K, N].

    Attributes:
        rows, depth, columns: M, padded K and padded N.
        bits: of a weight.
        x_dtype: of x.
        groups: rows of scales in a block of 256 rows of K.
    """

    rows: int
    depth: int
    columns: int
    bits: int
    x_dtype: Any
    groups: int

    @property
    def x_bytes(self) -> int:
        """Of a number of x."""
        return jnp.dtype(self.x_dtype).itemsize

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those that a program may have, in order."""
        integers = jnp.issubdtype(self.x_dtype, jnp.integer)
        return INTEGER_TOKENS if integers else TOKENS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Parts of M, N and K.

    Attributes:
        tokens: rows of x of a program, one of `Problem.tokens`.
        tiles: of 64 columns, of each of the two warpgroups.
        splits: of K, summed up after the kernel.
        stages: buffers in the ring.
    """

    tokens: int
    tiles: int
    splits: int
    stages: int


def plan(problem: Problem) -> Plan:
    """The plan that a model of the memory likes best."""
    parts = math.ceil(problem.rows / problem.tokens[-1])
    needed = math.ceil(problem.rows / parts)
    tokens = next(each for each in problem.tokens if each >= needed)
    blocks = problem.depth // BLOCK
    all_tiles = problem.columns // (COMPUTING * TILE)
    plans = [
        Plan(tokens, tiles, splits, _stages(problem, tokens, tiles))
        for tiles, splits in itertools.product((2, 1), range(1, blocks + 1))
        if all_tiles % tiles == 0 and blocks % splits == 0
    ]
    plans = [each for each in plans if each.stages >= LEAST_STAGES]
    assert plans, f"no ring of {LEAST_STAGES} buffers fits for {problem}"
    return min(plans, key=lambda each: seconds(problem, each))


def seconds(problem: Problem, each: Plan) -> float:
    """The modelled time in arbitrary units: bytes, less what runs at the same time."""
    wide = each.tiles * COMPUTING * TILE
    by_columns = problem.columns // wide
    by_tokens = math.ceil(problem.rows / each.tokens)
    programs = by_columns * by_tokens * each.splits
    weights = problem.depth * problem.columns * problem.bits / 8
    x = each.tokens * by_tokens * problem.depth * problem.x_bytes
    sums = each.splits * problem.columns * each.tokens * by_tokens * 4
    again = weights * (by_tokens - 1) + x * by_columns + 2 * sums
    # A ring has to be filled before the first product.
    steps = problem.depth // BLOCK // each.splits
    filling = (steps + 1) / steps
    waves = math.ceil(programs / CORES) * CORES / programs
    return (weights + x + again * SHARED_BY_ALL) * filling * waves


def scale_rows(group: int | None) -> int:
    """Rows of scales that a block of 256 rows of K has; none if they are of columns."""
    return 0 if group is None else max(BLOCK // group, 1)


def _stages(problem: Problem, tokens: int, tiles: int) -> int:
    """Buffers that fit beside the sums."""
    wide = tiles * COMPUTING * TILE
    stage = wide * BLOCK * problem.bits // 8
    stage += tokens * BLOCK * problem.x_bytes + problem.groups * wide * 4
    return min((SHARED_BYTES - wide * tokens * 4) // stage, MOST_STAGES)
