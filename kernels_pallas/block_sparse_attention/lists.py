"""Lists of the pairs of blocks that a TPU kernel visits, in the order that it does."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from kernels_pallas.block_sparse_attention.pattern import Mask
from kernels_pallas.block_sparse_attention.tiling import Tiling, choose

FIRST, LAST, RUNS = 1, 2, 4
PARTIAL, EDGE = 1, 2
"""Kinds of masks: some cells of the pair are out; some tokens have to be compared."""
KIND_SHIFT, KIND_BITS = 3, 3
REPEAT_SHIFT, REPEAT_BITS = 5, 127
WORDS_SHIFT = 12
PLACE_SHIFT, PLACE_BITS = 16, 2**16 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """The lists of a kernel, one for each different head, or group of heads.

    Attributes:
        places: int32 [L, E], `query << PLACE_SHIFT | key`, indices of blocks. Lists
            are as long as the longest; the last entry of a shorter one repeats, without
            RUNS.
        marks: int32 [L, E], what to do: FIRST and LAST of an accumulation, RUNS if
            there is anything to compute, the kind of masks, which query head of its
            group it is for if they differ, and which of `words`.
        of_line: which list each head, or group of heads, has.
        words: int32 [M, 1, cells of the outer block]: bit c of a word says whether the
            cell c of the inner block is seen by, or sees, that of the outer block.
        kinds: those that occur.
        pairs: how many entries of each list have RUNS.
        sees_nothing: whether a query of some layout has no key, if by query.
    """

    places: Int[np.ndarray, "L E"]
    marks: Int[np.ndarray, "L E"]
    of_line: Int[np.ndarray, " lines"]
    words: Int[np.ndarray, "M 1 W"]
    kinds: tuple[int, ...]
    pairs: Int[np.ndarray, " L"]
    sees_nothing: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs of blocks of one layout.

    Attributes:
        query, key: their indices [p].
        kind: that of their masks [p].
        cells: which cells of theirs are in [p, q, k].
        blocks: how many blocks of queries and of keys there are.
    """

    query: np.ndarray
    key: np.ndarray
    kind: np.ndarray
    cells: np.ndarray
    blocks: tuple[int, int]


@functools.lru_cache(maxsize=64)
def lists(mask: Mask, largest: int, by_query: bool, repeats: int) -> Lists:
    """The lists of a kernel.

    Args:
        mask: one that `tiling.choose` has a tiling for.
        largest: tokens in the largest block allowed.
        by_query: True orders by block of queries, a list per head; False by block of
            keys, a list per group of heads. If all heads of every group are alike, its
            entries are those of one head.
        repeats: query heads in a group.
    """
    tiling = choose(mask, largest, repeats)
    assert tiling is not None
    layouts = range(len(mask.pattern.distinct))
    pairs = [_pairs(mask, tiling, mask.cells(i, tiling.cell)) for i in layouts]
    of_head = mask.pattern.of_head
    size = 1 if by_query or len(of_head) == 1 else repeats
    groups = [of_head[i : i + size] for i in range(0, len(of_head), size)]
    if mask.pattern.alike(repeats):
        groups = [group[:1] for group in groups]
    different = list(dict.fromkeys(groups))
    found = [_ordered([pairs[i] for i in group], by_query) for group in different]
    of_line = np.array([different.index(group) for group in groups], np.int32)
    rows = [mask.cells(i, tiling.cell).any(axis=1).all() for i in layouts]
    return dataclasses.replace(
        _packed(found), of_line=of_line, sees_nothing=not all(rows)
    )


def _pairs(mask: Mask, tiling: Tiling, cells: Bool[np.ndarray, "n n"]) -> _Pairs:
    count = len(cells)
    edges = np.zeros_like(cells)
    if mask.causal:
        np.fill_diagonal(edges, True)
    elif mask.length % tiling.cell:
        edges[:, -1] = True  # where keys are padding
    tiles = tiling.split(tiling.arranged(cells))
    edges = tiling.split(tiling.arranged(edges & cells)).any(axis=(1, 3))
    query, key = np.nonzero(tiles.any(axis=(1, 3)))
    inside = tiles[query, :, key, :]
    # What rows of padding see is nobody's concern, and no reason for a mask.
    place = query[:, None] * inside.shape[1] + np.arange(inside.shape[1])
    inside = inside | (place >= count)[:, :, None]
    kind = PARTIAL * ~inside.all(axis=(1, 2)) + EDGE * np.asarray(edges)[query, key]
    return _Pairs(query, key, kind, inside, (len(tiles), tiles.shape[2]))


def _ordered(group: list[_Pairs], by_query: bool) -> tuple[np.ndarray, ...]:
    """places, marks without words, and words [E, W] of the heads of a group."""
    joined = [_joined(group, name) for name in ("query", "key", "kind", "cells")]
    query, key, kind, cells = joined
    repeat = np.repeat(np.arange(len(group)), [len(pairs.query) for pairs in group])
    outer, inner = (query, key) if by_query else (key, query)
    order = np.lexsort((repeat, inner, outer))
    words = _words(cells if by_query else cells.swapaxes(1, 2))[order]
    outer, inner, kind, repeat = (x[order] for x in (outer, inner, kind, repeat))
    marks = RUNS | kind << KIND_SHIFT | repeat << REPEAT_SHIFT
    # A block that sees nothing, or is not seen, still has a result: zeros.
    empty = np.setdiff1d(np.arange(group[0].blocks[0 if by_query else 1]), outer)
    order = np.argsort(np.concatenate([outer, empty]), kind="stable")
    outer = np.concatenate([outer, empty])[order]
    inner = np.concatenate([inner, np.zeros_like(empty)])[order]
    marks = np.concatenate([marks, np.zeros_like(empty)])[order]
    words = np.concatenate([words, np.zeros((len(empty), words.shape[1]), np.int32)])
    begins = np.diff(outer, prepend=-1) != 0
    ends = np.diff(outer, append=len(outer) + outer[-1] + 1) != 0
    marks = marks | FIRST * begins | LAST * ends
    query, key = (outer, inner) if by_query else (inner, outer)
    return query << PLACE_SHIFT | key, marks, words[order]


def _joined(group: list[_Pairs], name: str) -> np.ndarray:
    return np.concatenate([getattr(pairs, name) for pairs in group])


def _words(cells: Bool[np.ndarray, "p outer inner"]) -> Int[np.ndarray, "p outer"]:
    bits = np.uint32(1) << np.arange(cells.shape[2], dtype=np.uint32)
    return (
        np.where(cells, bits, np.uint32(0)).sum(axis=2, dtype=np.uint32).view(np.int32)
    )


def _packed(found: list[tuple[np.ndarray, ...]]) -> Lists:
    """Lists of one length, a line for each, every different mask of cells once."""
    longest = max(len(places) for places, _, _ in found)
    shape = len(found), longest
    all_places, all_marks = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    words = np.concatenate([words for _, _, words in found])
    marks = np.concatenate([marks for _, marks, _ in found])
    partial = (marks >> KIND_SHIFT & PARTIAL).astype(bool)
    different, index = np.unique(words[partial], axis=0, return_inverse=True)
    # Pairs without a mask name the mask of the one before: nothing is fetched for it.
    before = np.maximum(np.cumsum(partial) - 1, 0)
    which = np.ravel(index)[before] if partial.any() else np.zeros_like(before)
    marks = marks | which << WORDS_SHIFT
    start = 0
    for line, (places, _, _) in enumerate(found):
        mine = marks[start : start + len(places)]
        start += len(places)
        idle = mine[-1] & ~(FIRST | LAST | RUNS)
        all_places[line], all_marks[line] = places[-1], idle
        all_places[line, : len(places)], all_marks[line, : len(places)] = places, mine
    runs = (all_marks & RUNS) > 0
    kinds = np.unique(all_marks[runs] >> KIND_SHIFT & KIND_BITS)
    if not len(different):
        different = np.zeros((1, words.shape[1]), np.int32)
    return Lists(
        all_places,
        all_marks,
        np.arange(len(found), dtype=np.int32),
        different[:, None].astype(np.int32),
        tuple(int(kind) for kind in kinds),
        runs.sum(axis=1),
        sees_nothing=False,
    )
