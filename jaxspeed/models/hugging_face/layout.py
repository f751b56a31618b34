"""How a stored tensor and a parameter hold the same numbers in another order.

Both are written with the dimension letters of `models.layers`. Parentheses merge dims
and a number is a fused dim, of which each parameter is one part:

    parameter `query`             D H K
    Llama, `q_proj.weight`        (H K) D
    GPT-2, `c_attn.weight`        D (3 H K), part 0
    BLOOM, `query_key_value`      (H 3 K) D, part 0
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

LETTERS = {
    "model": "D",
    "heads": "H",
    "kv_heads": "G",
    "head": "K",
    "feed_forward": "F",
    "vocabulary": "V",
    "positions": "P",
}
"""Names of a parameter's dims -> their letters."""

Sizes = Mapping[str, int]
"""Length of each letter in the files; ours is longer where the vocabulary is padded."""
Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Stored:
    """The place of one parameter in a family's files.

    Attributes:
        name: the tensor's name; `{}` stands for the number of the layer.
        dims: its dims, as in `(3 H K) D`.
        part: which of the fused parts.
    """

    name: str
    dims: str
    part: int = 0

    @property
    def factors(self) -> list[list[str]]:
        """For each stored dim the letters (or number) that it merges."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.dims)
        return [(merged or single).split() for merged, single in groups]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(
            math.prod(_length(factor, sizes) for factor in merged)
            for merged in self.factors
        )

    def take(
        self, source: Any, letters: str, index: Mapping[str, Range], sizes: Sizes
    ) -> np.ndarray:
        """A slice of the parameter, reading no more of the file than its bounds.

        Args:
            source: anything that slices like an array of the stored shape.
            letters: the parameter's dims in order, `DHK`.
            index: start and stop along each of them.
            sizes: lengths in the files; what lies beyond them is zero.
        """
        shape = tuple(index[c][1] - index[c][0] for c in letters)
        inside = {c: (index[c][0], min(index[c][1], sizes[c])) for c in letters}
        if any(start >= stop for start, stop in inside.values()):
            return np.zeros(shape, np.float32)
        block = self._read(source, letters, inside, sizes)
        if block.shape == shape:
            return block
        padded = np.zeros(shape, block.dtype)
        padded[tuple(map(slice, block.shape))] = block
        return padded

    def _read(
        self, source: Any, letters: str, index: Mapping[str, Range], sizes: Sizes
    ) -> np.ndarray:
        """`take` where nothing lies beyond the file."""
        bounds, shape, within = [], [], []
        for merged in self.factors:
            ranges = [index.get(c, (self.part, self.part + 1)) for c in merged]
            bound, read = _bounds(ranges, [_length(c, sizes) for c in merged])
            bounds.append(slice(*bound))
            shape += read
            # A factor read in part has been cut already; one read whole has not.
            within += [
                slice(0, length) if length == stop - start else slice(start, stop)
                for (start, stop), length in zip(ranges, read, strict=True)
            ]
        block = np.asarray(source[tuple(bounds)]).reshape(shape)[tuple(within)]
        order = [c for merged in self.factors for c in merged]
        kept = [c for c in order if c in index]
        fused = tuple(i for i, c in enumerate(order) if c not in index)
        return block.squeeze(fused).transpose([kept.index(c) for c in letters])

    def put(
        self, target: np.ndarray, letters: str, value: np.ndarray, sizes: Sizes
    ) -> None:
        """Writes a whole parameter into its places of the stored tensor `target`."""
        order = [factor for merged in self.factors for factor in merged]
        view = target.reshape([_length(factor, sizes) for factor in order])
        kept = [factor for factor in order if factor in letters]
        value = value[tuple(slice(sizes[c]) for c in letters)]
        places = tuple(slice(None) if c in letters else self.part for c in order)
        view[places] = value.transpose([letters.index(c) for c in kept])


def _length(factor: str, sizes: Sizes) -> int:
    return int(factor) if factor.isdigit() else sizes[factor]


def _bounds(ranges: list[Range], lengths: list[int]) -> tuple[Range, list[int]]:
    """The shortest run of a merged dim that covers `ranges` of its factors.

    Returns:
        start and stop in the merged dim, and the lengths of the factors in that run:
        1 for those that one index fixes, then one range, then whole factors.
    """
    start = 0
    for i, (first, last) in enumerate(ranges):
        inner = math.prod(lengths[i + 1 :])
        start += first * inner
        if last - first != 1 or i == len(ranges) - 1:
            stop = start + (last - first) * inner
            return (start, stop), [1] * i + [last - first] + lengths[i + 1 :]
    raise AssertionError("a stored dim merges at least one factor")
