"""Layouts are DeepSpeed's; the lists of the kernels have all of their blocks."""

import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import (
    LAYOUTS,
    BigBirdLayout,
    BSLongformerLayout,
    DenseLayout,
    FixedLayout,
    LocalSlidingWindowLayout,
    VariableLayout,
    scheduled_fraction,
)
from kernels_pallas.block_sparse_attention.lists import (
    EDGE,
    FIRST,
    KIND_BITS,
    KIND_SHIFT,
    LAST,
    PARTIAL,
    PLACE_BITS,
    PLACE_SHIFT,
    REPEAT_BITS,
    REPEAT_SHIFT,
    RUNS,
    WORDS_SHIFT,
    lists,
)
from kernels_pallas.block_sparse_attention.pattern import Mask, Pattern
from kernels_pallas.block_sparse_attention.rows import cell_size, rows_by_length
from kernels_pallas.block_sparse_attention.tiling import choose


def drawn(layout):
    """Rows of a layout of one head, an x for what is seen."""
    return ["".join("x" if seen else "." for seen in row) for row in layout]


def test_fixed_unidirectional():
    layout = FixedLayout(num_heads=1, num_local_blocks=3, attention="unidirectional")
    assert drawn(layout(7 * 16)[0]) == [
        "x......",
        "xx.....",
        "xxx....",
        "..xx...",
        "..xxx..",
        "..xxxx.",
        "..x..xx",
    ]


def test_fixed_bidirectional_with_rows():
    layout = FixedLayout(
        num_heads=1, num_local_blocks=2, horizontal_global_attention=True
    )
    assert drawn(layout(5 * 16 - 3)[0]) == [
        "xx.xx",
        "xxxxx",
        ".xxxx",
        "xxxxx",
        "xxxxx",
    ]


def test_fixed_patterns_go_from_the_end_of_the_window():
    layout = FixedLayout(
        num_heads=3,
        different_layout_per_head=True,
        num_local_blocks=4,
        num_global_blocks=2,
        num_different_global_patterns=2,
        attention="unidirectional",
    )(8 * 16)
    last_rows = [drawn(head)[6] for head in layout]
    assert last_rows == ["..xxxxx.", "xx..xxx.", "..xxxxx."]


def test_variable():
    layout = VariableLayout(
        num_heads=2,
        local_window_blocks=[1, 2],
        global_block_indices=[2, 99],
        attention="unidirectional",
    )(6 * 16)
    assert (layout[0] == layout[1]).all()
    assert drawn(layout[0]) == [
        "x.....",
        ".x....",
        ".xx...",
        "..xx..",
        "..xxx.",
        "..x..x",
    ]


def test_global_ranges():
    layout = BSLongformerLayout(
        num_heads=1,
        num_sliding_window_blocks=1,
        global_block_indices=[1],
        global_block_end_indices=[3],
    )
    assert drawn(layout(5 * 16)[0]) == ["xxx..", "xxxxx", "xxxxx", ".xxx.", ".xx.x"]


def test_longformer_and_sliding_window():
    longformer = BSLongformerLayout(num_heads=1, attention="unidirectional")
    assert drawn(longformer(5 * 16)[0]) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    window = LocalSlidingWindowLayout(num_heads=1, num_sliding_window_blocks=5)
    assert drawn(window(5 * 16)[0]) == ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]


@pytest.mark.parametrize("attention", ["unidirectional", "bidirectional"])
def test_bigbird(attention):
    layout = BigBirdLayout(
        num_heads=2,
        different_layout_per_head=True,
        attention=attention,
        num_random_blocks=2,
    )
    blocks = layout(64 * 16)
    without = BSLongformerLayout(num_heads=1, attention=attention)(64 * 16)
    assert (blocks & without == without).all()
    added = blocks.sum(axis=2) - without.sum(axis=2)
    assert added.max() == 2 and added[:, 32:].mean() > 1
    assert (blocks[0] != blocks[1]).any()
    assert (blocks == layout(64 * 16)).all()
    if layout.causal:
        assert not np.triu(blocks, 1).any()


@pytest.mark.parametrize("mode", LAYOUTS)
def test_every_mode_of_a_configuration(mode):
    layout = LAYOUTS[mode](num_heads=3, block=8, attention="unidirectional")(8 * 9 + 1)
    assert layout.shape == (3, 10, 10)
    assert layout.diagonal(axis1=1, axis2=2).all()


FIXED = dict(num_local_blocks=4, num_global_blocks=2, different_layout_per_head=True)


@pytest.mark.parametrize(
    "layout",
    [
        FixedLayout(num_heads=2, num_different_global_patterns=2, **FIXED),
        FixedLayout(num_heads=1, horizontal_global_attention=True),
        VariableLayout(num_heads=1, num_random_blocks=2, local_window_blocks=(1, 3)),
        BigBirdLayout(num_heads=2, num_random_blocks=2, different_layout_per_head=True),
        BSLongformerLayout(num_heads=1, global_block_indices=(0, 7)),
    ],
    ids=lambda layout: type(layout).__name__,
)
def test_causal_layouts_are_the_beginning_of_longer_ones(layout):
    """A cache is longer than what it holds, and should be read as training read."""
    longest = layout(20 * 16, causal=True)
    assert not np.triu(longest, 1).any()
    for count in range(1, 20):
        shorter = layout(count * 16, causal=True)
        assert (shorter == longest[:, :count, :count]).all(), count


@pytest.mark.parametrize(
    "layout, given, message",
    [
        (DenseLayout, dict(attention="causal"), "attention='causal'; choose one of"),
        (FixedLayout, dict(num_global_blocks=3), "should divide num_local_blocks=4"),
        (FixedLayout, dict(num_different_global_patterns=5), "give 1 to 4"),
        (FixedLayout, dict(num_different_global_patterns=2), "different_layout_per"),
        (
            FixedLayout,
            dict(horizontal_global_attention=True, attention="unidirectional"),
            "needs attention='bidirectional'",
        ),
        (VariableLayout, dict(local_window_blocks=[]), "at least one size"),
        (VariableLayout, dict(local_window_blocks=[4, 0]), "0]; give 1 or more"),
        (VariableLayout, dict(seed=-1), "seed=-1; give 0 or more"),
        (VariableLayout, dict(global_block_indices=(-1,)), "give 0 or more"),
        (DenseLayout, dict(block=0), "block=0; give 1 or more"),
        (FixedLayout, dict(num_global_blocks=0), "num_global_blocks=0; give 1"),
        (
            FixedLayout,
            dict(num_local_blocks=-4, num_global_blocks=-1),
            "num_local_blocks=-4; give 1 or more",
        ),
        (FixedLayout, dict(num_different_global_patterns=0), "=0; give 1 or more"),
        (BigBirdLayout, dict(num_global_blocks=-1), "num_global_blocks=-1; give 0"),
        (BigBirdLayout, dict(num_random_blocks=-1), "num_random_blocks=-1; give 0"),
        (LocalSlidingWindowLayout, dict(num_sliding_window_blocks=-3), "give 1 or"),
        (
            BSLongformerLayout,
            dict(global_block_end_indices=[0]),
            "each end after its start",
        ),
    ],
)
def test_refuses_options(layout, given, message):
    with pytest.raises(ValueError, match=message):
        layout(num_heads=2, **given)


def masks():
    random = np.random.default_rng(0)
    for block, length, heads, causal in [
        (16, 900, 4, True),
        (64, 2000, 2, False),
        (24, 400, 2, True),
        (128, 2048, 1, True),
        (1024, 3000, 2, False),
    ]:
        count = -(-length // block)
        layout = random.random((heads, count, count)) < 0.2
        layout[:, :, count // 2] = True
        yield Mask(Pattern.of(layout), block, length, causal)


MASKS = list(masks())


def listed_cells(mask, repeats, by_query):
    """The cells that the entries of the lists name, for each head, from their words."""
    found = lists(mask, 1024, by_query, repeats)
    tiling = choose(mask, 1024, repeats)
    count = mask.count(tiling.cell)
    identity = np.arange(count)
    orders = [
        identity if o is None else o for o in (tiling.query_order, tiling.key_order)
    ]
    sizes = tiling.query // tiling.cell, tiling.key // tiling.cell
    heads = len(mask.pattern.of_head)
    cells = np.zeros((heads, count, count), int)
    edges = np.zeros((heads, count, count), bool)
    for line, which in enumerate(found.of_line):
        open_at = None
        for place, mark in zip(found.places[which], found.marks[which], strict=True):
            i, j = place >> PLACE_SHIFT, place & PLACE_BITS
            outer = i if by_query else j
            if mark & FIRST:
                assert open_at is None
                open_at = outer
            kind = mark >> KIND_SHIFT & KIND_BITS
            if mark & RUNS:
                assert open_at == outer
                words = found.words[mark >> WORDS_SHIFT, 0].astype(np.uint32)
                width = sizes[1] if by_query else sizes[0]
                inside = (words[:, None] >> np.arange(width, dtype=np.uint32)) & 1
                inside = inside if by_query else inside.T
                inside = inside if kind & PARTIAL else np.ones(sizes, int)
                rows = range(i * sizes[0], min((i + 1) * sizes[0], count))
                columns = range(j * sizes[1], min((j + 1) * sizes[1], count))
                inside = inside[: len(rows), : len(columns)]
                where = np.ix_(orders[0][rows], orders[1][columns])
                repeat = mark >> REPEAT_SHIFT & REPEAT_BITS
                head = line if by_query else line * repeats + repeat
                cells[head][where] += inside
                edges[head][where] |= bool(kind & EDGE)
            if mark & LAST:
                assert open_at == outer
                open_at = None
        assert open_at is None
    return cells, edges


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.block))
@pytest.mark.parametrize("by_query", [True, False])
def test_lists_have_every_cell_once(mask, by_query):
    heads = len(mask.pattern.of_head)
    repeats = 2 if heads % 2 == 0 else 1
    cells, edges = listed_cells(mask, repeats, by_query)
    cell = choose(mask, 1024, repeats).cell
    for head, index in enumerate(mask.pattern.of_head):
        want = mask.cells(index, cell)
        assert (cells[head] == want).all()
        if mask.causal:
            assert edges[head][want & np.eye(len(want), dtype=bool)].all()
        elif mask.length % cell:
            assert edges[head][:, -1][want[:, -1]].all()


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.block))
def test_rows_have_every_cell_once(mask):
    count = mask.count(cell_size(mask.block))
    cells = np.zeros((len(mask.pattern.distinct), count, count), int)
    work = wanted = 0
    for rows in rows_by_length(mask):
        for layout, lists_of in enumerate(rows.lists):
            for row, each in zip(rows.rows, lists_of, strict=True):
                np.add.at(cells[layout, row], each[each >= 0], 1)
        wanted += (rows.lists >= 0).sum(axis=2).max(axis=0).sum()
        work += rows.lists[0].size
    assert work <= 1.25 * wanted
    for index in range(len(cells)):
        want = mask.cells(index, cell_size(mask.block))
        assert (cells[index] == want).all()


@pytest.mark.parametrize("attention", ["unidirectional", "bidirectional"])
@pytest.mark.parametrize(
    "make",
    [
        FixedLayout,
        VariableLayout,
        BigBirdLayout,
        BSLongformerLayout,
        LocalSlidingWindowLayout,
    ],
)
def test_work_goes_with_density(make, attention):
    """At blocks that the matrix unit likes."""
    layout = make(num_heads=2, block=128, attention=attention)
    work = scheduled_fraction(
        layout(16384), block=128, causal=attention == "unidirectional"
    )
    assert 1 <= work.ratio <= 1.25


def test_small_blocks_that_all_see_are_put_side_by_side():
    """Without another order of tokens every pair of blocks has something."""
    layout = FixedLayout(num_heads=1, attention="unidirectional")(32768)
    work = scheduled_fraction(layout, block=16)
    assert work.reordered and work.ratio <= 1.25


def test_dense_is_dense():
    work = scheduled_fraction(DenseLayout(num_heads=1)(4096), block=16, causal=False)
    assert work.density == work.scheduled == 1
