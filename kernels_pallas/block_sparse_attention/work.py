"""How much of dense attention a layout lists, and the kernels compute."""

import dataclasses

import numpy as np
from jaxtyping import Bool

from kernels_pallas.block_sparse_attention import tiling
from kernels_pallas.block_sparse_attention.lists import lists
from kernels_pallas.block_sparse_attention.pattern import Mask, Pattern


@dataclasses.dataclass(frozen=True)
class Work:
    """Scores, as fractions of those of dense attention in blocks of the layout.

    Attributes:
        density: those of the blocks that the layout lists.
        scheduled: those of the pairs of blocks that the TPU kernels compute.
        query_block, key_block: tokens in their blocks.
        reordered: whether tokens are put into another order for it.
    """

    density: float
    scheduled: float
    query_block: int
    key_block: int
    reordered: bool

    @property
    def ratio(self) -> float:
        """Scores computed for each one that is listed."""
        return self.scheduled / self.density


def scheduled_fraction(
    layout: Bool[np.ndarray, "P N N"],
    *,
    block: int,
    causal: bool = True,
    largest_block: int = 1024,
) -> Work:
    """The work of a layout of N * block tokens.

    Args:
        layout, block, causal: as for `block_sparse_attention`.
        largest_block: tokens in the largest block of the kernels: 1024 with rows of K
            of at most 512 bytes, 512 otherwise.

    Raises:
        ValueError: the TPU kernels cannot run with the layout.
    """
    length = layout.shape[1] * block
    mask = Mask(Pattern.of(layout.astype(bool)), block, length, causal)
    reason = tiling.refusal(mask, largest_block, 1)
    tiles = tiling.choose(mask, largest_block, 1)
    if reason is not None or tiles is None:
        raise ValueError(f"the TPU kernels cannot run with this layout: {reason}")
    cells = [mask.cells(i, block) for i in mask.pattern.of_head]
    whole = np.ones((layout.shape[1],) * 2, bool)
    dense = int(np.tril(whole).sum() if causal else whole.sum()) * block**2
    listed = lists(mask, largest_block, True, 1)
    pairs = listed.pairs[listed.of_line].mean()
    return Work(
        density=float(np.mean([each.sum() for each in cells])) * block**2 / dense,
        scheduled=float(pairs) * tiles.query * tiles.key / dense,
        query_block=tiles.query,
        key_block=tiles.key,
        reordered=tiles.query_order is not None or tiles.key_order is not None,
    )
