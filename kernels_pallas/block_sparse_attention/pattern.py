"""Layouts as what a traced program depends on: comparable, hashable, cut into cells."""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A layout [P, N, N] with every different head kept once.

    Attributes:
        count: N, blocks in a row.
        distinct: the different [N, N] layouts, packed bits.
        of_head: which of them each of the P heads has.
    """

    count: int
    distinct: tuple[bytes, ...]
    of_head: tuple[int, ...]

    @classmethod
    def of(cls, layout: Bool[np.ndarray, "P N N"]) -> "Pattern":
        """Takes what was made with `np.broadcast_to` as one head, repeated."""
        heads = layout[:1] if layout.strides[0] == 0 else layout
        packed = [np.packbits(head).tobytes() for head in heads]
        distinct = tuple(dict.fromkeys(packed))
        index = {bits: i for i, bits in enumerate(distinct)}
        of_head = [index[bits] for bits in packed]
        return cls(
            layout.shape[1], distinct, tuple(of_head * (len(layout) // len(heads)))
        )

    def alike(self, repeats: int) -> bool:
        """Whether each `repeats` heads in a row have the same layout."""
        heads = np.array(self.of_head)
        same = len(heads) == 1 or heads.reshape(-1, repeats) == heads[::repeats, None]
        return bool(np.all(same))

    def layout(self, index: int) -> Bool[np.ndarray, "N N"]:
        """One of the different layouts."""
        bits = np.frombuffer(self.distinct[index], np.uint8)
        cells = np.unpackbits(bits, count=self.count**2)
        return cells.reshape(self.count, self.count).astype(bool)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which scores count, for sequences of one length.

    Attributes:
        pattern: the layout.
        block: tokens in a block of it.
        length: tokens.
        causal: whether a query also sees no token after itself.
    """

    pattern: Pattern
    block: int
    length: int
    causal: bool

    def count(self, cell: int) -> int:
        """Cells in a row."""
        return math.ceil(self.length / cell)

    def cells(self, index: int, cell: int) -> Bool[np.ndarray, "n n"]:
        """A layout in cells of `cell` tokens, which divides the block.

        Cells after the diagonal are out if it is causal. Those on the diagonal still
        need a comparison of tokens.
        """
        times, count = self.block // cell, self.count(cell)
        layout = self.pattern.layout(index)
        layout = layout.repeat(times, axis=0)[:count].repeat(times, axis=1)[:, :count]
        return np.tril(layout) if self.causal else layout
