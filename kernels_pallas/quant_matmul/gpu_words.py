"""How codes lie in words of 32 bits for a Hopper GPU, and what they become there.

The tensor core takes weights from registers (`gpu_fragments`), so codes are stored in
the order of these registers, and few operations on whole words make them operands. A
tile is 64 columns of the weight and 64 rows of K. Thread `32 * u + 4 * g + t` has its
columns `16 * u + g` and 8 further, and rows `16 * i + 8 * h + 2 * t + e` of K for i < 4
and h, e < 2. Byte `2 * e + h` of its words is the code of a row (of integers less the
least one), of

- 8 bits: word `2 * i + r`, where r = 1 is the column 8 further;
- 4 bits: word i, with r = 0 in the low half of the byte and r = 1 in the high one;
- 6 bits: the byte of a plane of `layouts.Slabs`, whose slabs are the tiles.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8, UInt32

from kernels_pallas.gpu_fragments import Operand
from kernels_pallas.quant_matmul.format import Format
from kernels_pallas.quant_matmul.layouts import BLOCK, Slabs
from kernels_pallas.quant_matmul.numbers import Integer

TILE = 64
"""Rows and columns of a tile."""
TILES = BLOCK // TILE
"""Of a block of 256 rows."""
INTEGER = 2.0**-9
"""Of float16, what stands for 1."""
WIDTH = 256
"""Words of a row of the stored array; no copy may have more."""

Word = UInt32[Array, "R 256"]
Read = Callable[[int, int], Word]
"""Some rows of the words of a block, from one on."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes of a format.

    Attributes:
        format: whose codes they are, of float32 scales.
    """

    format: Format

    @property
    def bits(self) -> int:
        """4, 6 or 8 that a code takes."""
        return self.format.numbers.bits

    @property
    def integers(self) -> bool:
        """Whether they are integers."""
        return isinstance(self.format.numbers, Integer)

    @property
    def _sign(self) -> np.uint8:
        return np.uint8(2 ** (self.bits - 1) if self.integers else 0)

    @property
    def rows(self) -> int:
        """Rows of words in a block of 256 rows and 64 columns."""
        return BLOCK * TILE * self.bits // 32 // WIDTH

    def factor(self, dtype: Any) -> float:
        """What a weight is of its number in an operand of this dtype."""
        if self.integers and dtype == jnp.float16:
            return 1 / INTEGER
        if self.bits == 4:
            return 2.0**-4
        if self.format.carrier == jnp.float8_e4m3fn and dtype == jnp.float16:
            return self.format.factor * 2.0**8
        return self.format.factor

    def pack(self, data: Array) -> UInt32[Array, "*L T B R 256"]:
        """The words of the format's data: tiles of 64 columns, blocks of 256 rows."""
        layout = self.format.layout
        if isinstance(layout, Slabs):
            *lead, blocks, planes, rows, columns = data.shape
            words = _pack(data.reshape(*lead, blocks * planes * rows, columns))
        else:
            codes = layout.unpack(data) ^ self._sign
            words = _pack(codes, self.bits == 4)
            blocks = layout.rows(data.shape) // BLOCK
        return words.reshape(*words.shape[:-2], blocks, self.rows, WIDTH)

    def unpack(self, words: UInt32[Array, "*L T B R 256"]) -> Array:
        """The inverse of `pack`."""
        *lead, tiles, blocks, _, _ = words.shape
        per_tile = 2 * WIDTH if self.bits == 4 else 4 * WIDTH
        found = _unpack(words.reshape(*lead, tiles, -1, per_tile), self.bits == 4)
        layout = self.format.layout
        if isinstance(layout, Slabs):
            rows, columns = blocks * BLOCK, tiles * TILE
            return found.reshape(*lead, *layout.data_shape(rows, columns))
        return layout.pack(found ^ self._sign)

    def operands(self, read: Read, dtype: Any) -> list[Operand]:
        """Those of the four tiles of a block, of float16 or of the carrier's kind."""
        if dtype == jnp.float16:
            return [self._halves(words) for words in self._tiles(read)]
        return [self._bytes(words) for words in self._tiles(read)]

    def _tiles(self, read: Read) -> Sequence[Word]:
        """Stored words of each tile, or their bytes for codes of 6 bits."""
        layout = self.format.layout
        if isinstance(layout, Slabs):
            return layout.split([read(4 * i, 4) for i in range(layout.planes)])
        rows = self.rows // TILES
        return [read(rows * i, rows) for i in range(TILES)]

    def _halves(self, words: Word) -> Operand:
        """Two numbers of float16 in a word, with the fewest operations.

        An integer without a sign in the lowest bits of a float16 is its multiple of
        2**-24; four bits further up, of 2**-20. One operation makes it `2**-9 * code`.
        """
        if self.bits == 4:
            masks = (np.uint32(0x000F000F), np.uint32(0x00F000F0))
            pairs = [
                (words >> np.uint32(8) if n > 1 else words) & masks[n % 2]
                for n in range(4)
            ]
            order = [[4 * v + n for v in range(4)] for n in range(4)]
            scales = [2.0**15, 2.0**11] * 2
            return Operand(pairs, np.array(order), scales, -8 * INTEGER)
        order = [[4 * (v // 2) + 2 * h + v % 2 for v in range(8)] for h in (0, 1)]
        if self.integers:
            low = np.uint32(0x00FF00FF)
            pair = [words & low, (words >> np.uint32(8)) & low]
            return Operand(pair, np.array(order), [2.0**15] * 2, -128 * INTEGER)
        first, second = words << np.uint32(8), words
        if self.format.carrier == jnp.float8_e5m2:
            high = np.uint32(0xFF00FF00)
            return Operand([first & high, second & high], np.array(order))
        sign, rest = np.uint32(0x80008000), np.uint32(0x3F803F80)
        shifted = words << np.uint32(7), words >> np.uint32(1)
        pair = [
            (whole & sign) | (each & rest)
            for whole, each in zip((first, second), shifted, strict=True)
        ]
        return Operand(pair, np.array(order))

    def _bytes(self, words: Word) -> Operand:
        """Four numbers of 8 bits in a word; int4 numbers are 16 times as large."""
        sign = np.uint32(0x80808080)
        if self.bits == 4:
            high = np.uint32(0xF0F0F0F0)
            pair = [((words << np.uint32(4)) & high) ^ sign, (words & high) ^ sign]
            order = [[2 * v + r for v in range(4)] for r in (0, 1)]
            return Operand(pair, np.array(order))
        if self.integers:
            words = words ^ sign
        return Operand([words], np.arange(8)[None])


def permute(x: Array) -> Array:
    """x [M, K] in the order of the rows of K that operands of 8 bits have."""
    rows, depth = x.shape
    split = x.reshape(rows, depth // 16, 2, 4, 2)  # h, t, e
    return split.transpose(0, 1, 3, 4, 2).reshape(rows, depth)


# Of codes [K, N]: tiles along K, i // 2, i % 2, h, t, e, tiles along N, u, r, g; stored
# are tiles along N and K, i // 2, the thread (u, g, t), i % 2, r, and the bytes (e, h).
_SPLIT = (2, 2, 2, 4, 2), (4, 2, 8)
_BYTES = (6, 0, 1, 7, 9, 4, 2, 8, 5, 3)
# With the two r in a byte there are only four words to a thread.
_NIBBLES = (6, 0, 7, 8, 4, 1, 2, 5, 3)


def _pack(codes: UInt8[Array, "*L K N"], halves: bool = False) -> Array:
    *lead, rows, columns = codes.shape
    deep, wide = _SPLIT
    shape = (*lead, rows // TILE, *deep, columns // TILE, *wide)
    split, order = codes.reshape(shape), _BYTES
    if halves:
        low, high = split[..., 0, :], split[..., 1, :]
        split, order = low | (high << np.uint8(4)), _NIBBLES
    stored = split.transpose(_behind(lead, order))
    per_tile = TILE * TILE // (8 if halves else 4)
    shape = (*lead, columns // TILE, rows // TILE, per_tile, 4)
    return lax.bitcast_convert_type(stored.reshape(shape), jnp.uint32)


def _unpack(words: UInt32[Array, "*L T P W"], halves: bool) -> UInt8[Array, "*L K N"]:
    *lead, tiles, parts, _ = words.shape
    deep, wide = _SPLIT
    order = _NIBBLES if halves else _BYTES
    sizes = (parts, *deep, tiles, *wide)
    if halves:
        sizes = (*sizes[:-2], sizes[-1])
    stored = lax.bitcast_convert_type(words, jnp.uint8)
    stored = stored.reshape(*lead, *(sizes[i] for i in order))
    split = stored.transpose(_behind(lead, tuple(np.argsort(order))))
    if halves:
        split = jnp.stack([split & np.uint8(15), split >> np.uint8(4)], axis=-2)
    return split.reshape(*lead, parts * TILE, tiles * TILE)


def _behind(lead: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """A permutation of the dims behind leading ones."""
    return (*range(len(lead)), *(len(lead) + int(i) for i in order))
