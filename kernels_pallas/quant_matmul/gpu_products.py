"""The tensor core's products with weights in registers.

The interpreter of Mosaic GPU has none, and no registers: tests that interpret a kernel
put other functions here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from kernels_pallas import gpu_fragments

Part = tuple[Callable[[], Array], Any]
"""What makes a left operand [N, K] in registers, and a right one [K, M] in memory."""


def read(words: Any) -> UInt32[Array, "R 256"]:
    """Words of shared memory, each thread its own."""
    layout = gpu_fragments.words_layout(words.shape)
    return plgpu.layout_cast(words[...], layout)


def accumulate(total: Array, parts: Sequence[Part]) -> Array:
    """`total` and the products of all parts.

    An operand is made while the product before it runs.
    """

    def add(accumulator: Any) -> None:
        for left, right in parts:
            plgpu.wgmma(accumulator, left(), right)

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(total)
    return pl.run_state(add)(accumulator)
