"""Block layouts of DeepSpeed's sparse attention, as bool arrays [H, N, N].

Names, defaults and meaning are those of `sparse_attention` in a DeepSpeed configuration
(`deepspeed.ops.sparse_attention.SparsityConfig` and its subclasses; the fixed pattern
is from Child et al., 2019, "Sparse Transformers"; BigBird from Zaheer et al., 2020;
Longformer from Beltagy et al., 2020). Entry [h, i, j] says whether the queries of block
i see the keys of block j in head h. What differs: a length that is no multiple of the
block has a short last block instead of an error; random blocks come from `seed`; and a
causal layout is the beginning of every longer one, so that a cache of any size sees
what training saw: random blocks are drawn from those up to a row's own, all of them if
there are fewer than asked for, and global blocks stay in place in a short last window.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import field

import numpy as np
from jaxtyping import Bool

from kernels_pallas.block_sparse_attention.layout_parts import (
    check_bounds,
    check_horizontal,
    check_ranges,
    fill_global,
    fill_random,
    fill_sliding,
    fill_windows,
    ranges,
)

ATTENTION = ("unidirectional", "bidirectional")
AT_LEAST_0, AT_LEAST_1 = {"least": 0}, {"least": 1}
"""Metadata of a field: the least that it, or each number in it, may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(abc.ABC):
    """What all layouts have in common.

    Attributes:
        num_heads: H.
        block: tokens in a block.
        different_layout_per_head: if False, every head has the layout of the first.
        attention: "unidirectional" leaves blocks after a query's own out.
    """

    num_heads: int = field(metadata=AT_LEAST_1)
    block: int = field(default=16, metadata=AT_LEAST_1)
    different_layout_per_head: bool = False
    attention: str = "bidirectional"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r}; choose one of {ATTENTION}")
        check_bounds(self)

    @property
    def causal(self) -> bool:
        """Whether blocks after a query's own are left out."""
        return self.attention == "unidirectional"

    def __call__(
        self, length: int, *, causal: bool | None = None
    ) -> Bool[np.ndarray, "H N N"]:
        """The layout of `length` tokens, N = ceil(length / block).

        Args:
            length: tokens.
            causal: whether blocks after a query's own are left out; None: as
                `attention` says. True is for a causal model with global rows, which
                only a bidirectional layout may have.
        """
        causal = self.causal if causal is None else causal
        count = math.ceil(length / self.block)
        heads = self.num_heads if self.different_layout_per_head else 1
        layouts = np.zeros((heads, count, count), bool)
        for head in range(heads):
            self.fill(layouts[head], head, causal)
        if causal:
            layouts &= np.tri(count, dtype=bool)
        return np.broadcast_to(layouts, (self.num_heads, count, count))

    @abc.abstractmethod
    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets the blocks that queries of `head` see in `layout`, given as zeros.

        Where it is `causal`, later blocks are taken out afterwards, and what is left of
        a row should not depend on N.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLayout(Layout):
    """Every block; for comparison."""

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets all."""
        layout[:] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLayout(Layout):
    """Windows side by side; some blocks of each are seen from everywhere after.

    Attributes:
        num_local_blocks: blocks in a window, within which everything is seen.
        num_global_blocks: how many blocks of a window are global; divides the former.
        horizontal_global_attention: global blocks also see everything; bidirectional
            only.
        num_different_global_patterns: head h has as global blocks those that are
            `1 + h % num_different_global_patterns` times `num_global_blocks` before the
            end of the window.
    """

    num_local_blocks: int = field(default=4, metadata=AT_LEAST_1)
    num_global_blocks: int = field(default=1, metadata=AT_LEAST_1)
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = field(default=1, metadata=AT_LEAST_1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_horizontal(self.horizontal_global_attention, self.causal)
        most, rest = divmod(self.num_local_blocks, self.num_global_blocks)
        if rest:
            raise ValueError(
                f"num_global_blocks={self.num_global_blocks} should divide "
                f"num_local_blocks={self.num_local_blocks}"
            )
        patterns = self.num_different_global_patterns
        if patterns > most:
            raise ValueError(
                f"num_different_global_patterns={patterns}; give 1 to {most}, the "
                "number of places for global blocks in a window"
            )
        if patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns={patterns} needs "
                "different_layout_per_head=True"
            )

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets the windows, then the global columns and rows."""
        count, window = len(layout), self.num_local_blocks
        fill_windows(layout, [window])
        size = self.num_global_blocks
        place = window - (1 + head % self.num_different_global_patterns) * size
        for start in range(0, count, window):
            first = start + place
            if start + window > count and not causal:
                first = max(min(first, count - size), 0)
            blocks = range(first, first + size)
            fill_global(layout, blocks, rows=self.horizontal_global_attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableLayout(Layout):
    """Windows of given sizes side by side, given global blocks, random blocks.

    Attributes:
        num_random_blocks: random blocks per row.
        local_window_blocks: blocks in the first, second, ... window; the last size
            repeats to the end.
        global_block_indices: blocks that are seen from everywhere (after them).
        global_block_end_indices: if given, the ends (exclusive) of global ranges that
            begin at `global_block_indices`.
        horizontal_global_attention: global blocks also see everything; bidirectional
            only.
        seed: of the random blocks.
    """

    num_random_blocks: int = field(default=0, metadata=AT_LEAST_0)
    local_window_blocks: Sequence[int] = field(default=(4,), metadata=AT_LEAST_1)
    global_block_indices: Sequence[int] = field(default=(0,), metadata=AT_LEAST_0)
    global_block_end_indices: Sequence[int] | None = None
    horizontal_global_attention: bool = False
    seed: int = field(default=0, metadata=AT_LEAST_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_horizontal(self.horizontal_global_attention, self.causal)
        check_ranges(self.global_block_indices, self.global_block_end_indices)
        if not self.local_window_blocks:
            raise ValueError("local_window_blocks is empty; give at least one size")

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets random blocks, windows, then global columns and rows."""
        fill_random(layout, self.num_random_blocks, (self.seed, head), causal)
        fill_windows(layout, self.local_window_blocks)
        starts, ends = self.global_block_indices, self.global_block_end_indices
        for blocks in ranges(starts, ends, len(layout)):
            fill_global(layout, blocks, rows=self.horizontal_global_attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBirdLayout(Layout):
    """Random blocks, a sliding window, and global blocks at the beginning.

    Attributes:
        num_random_blocks: random blocks per row.
        num_sliding_window_blocks: blocks of the window around each block, odd; half of
            it is on either side.
        num_global_blocks: how many blocks at the beginning see and are seen by all.
        seed: of the random blocks.
    """

    num_random_blocks: int = field(default=1, metadata=AT_LEAST_0)
    num_sliding_window_blocks: int = field(default=3, metadata=AT_LEAST_1)
    num_global_blocks: int = field(default=1, metadata=AT_LEAST_0)
    seed: int = field(default=0, metadata=AT_LEAST_0)

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets random blocks, the window, then global rows and columns."""
        fill_random(layout, self.num_random_blocks, (self.seed, head), causal)
        fill_sliding(layout, self.num_sliding_window_blocks)
        blocks = range(min(self.num_global_blocks, len(layout)))
        fill_global(layout, blocks, rows=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSLongformerLayout(Layout):
    """A sliding window, and given global blocks that see and are seen by all.

    Attributes:
        num_sliding_window_blocks: as in `BigBirdLayout`.
        global_block_indices, global_block_end_indices: as in `VariableLayout`.
    """

    num_sliding_window_blocks: int = field(default=3, metadata=AT_LEAST_1)
    global_block_indices: Sequence[int] = field(default=(0,), metadata=AT_LEAST_0)
    global_block_end_indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self.global_block_indices, self.global_block_end_indices)

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets the window, then global rows and columns."""
        fill_sliding(layout, self.num_sliding_window_blocks)
        starts, ends = self.global_block_indices, self.global_block_end_indices
        for blocks in ranges(starts, ends, len(layout)):
            fill_global(layout, blocks, rows=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSlidingWindowLayout(Layout):
    """A sliding window and nothing else.

    Attributes:
        num_sliding_window_blocks: as in `BigBirdLayout`.
    """

    attention: str = "unidirectional"
    num_sliding_window_blocks: int = field(default=3, metadata=AT_LEAST_1)

    def fill(self, layout: Bool[np.ndarray, "N N"], head: int, causal: bool) -> None:
        """Sets the window."""
        fill_sliding(layout, self.num_sliding_window_blocks)


LAYOUTS: dict[str, type[Layout]] = {
    "dense": DenseLayout,
    "fixed": FixedLayout,
    "variable": VariableLayout,
    "bigbird": BigBirdLayout,
    "bslongformer": BSLongformerLayout,
    "local": LocalSlidingWindowLayout,
}
"""By the value of `mode` in `sparse_attention` of a DeepSpeed configuration."""
