"""The parts that layouts are made of: functions that set blocks of a bool [N, N]."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool


def fill_windows(layout: Bool[np.ndarray, "N N"], sizes: Sequence[int]) -> None:
    """Windows of these sizes side by side, the last one again and again."""
    start, sizes = 0, list(sizes)
    while start < len(layout):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        layout[start : start + size, start : start + size] = True
        start += size


def fill_sliding(layout: Bool[np.ndarray, "N N"], size: int) -> None:
    """A band of `size` blocks around the diagonal, half of them on either side."""
    place = np.arange(len(layout))
    layout |= abs(place[:, None] - place[None, :]) <= size // 2


def fill_global(layout: Bool[np.ndarray, "N N"], blocks: range, *, rows: bool) -> None:
    """Blocks that are seen from everywhere, and with `rows` see everything."""
    layout[:, blocks.start : blocks.stop] = True
    if rows:
        layout[blocks.start : blocks.stop] = True


def fill_random(
    layout: Bool[np.ndarray, "N N"], number: int, seed: tuple[int, int], causal: bool
) -> None:
    """`number` blocks in each row, of those up to the row's own if causal."""
    random = np.random.default_rng(seed)
    for row in range(len(layout)):
        candidates = row + 1 if causal else len(layout)
        chosen = random.choice(candidates, min(number, candidates), replace=False)
        layout[row, chosen] = True


def ranges(
    starts: Sequence[int], ends: Sequence[int] | None, count: int
) -> Iterator[range]:
    """Global ranges of blocks that begin within a layout of `count` blocks."""
    if ends is None:
        ends = [start + 1 for start in starts]
    for start, end in zip(starts, ends, strict=True):
        if start < count:
            yield range(start, min(end, count))


def check_bounds(layout: Any) -> None:
    """Raises ValueError if a field is below the `least` of its metadata."""
    for field in dataclasses.fields(layout):
        value, least = getattr(layout, field.name), field.metadata.get("least")
        if least is None:
            continue
        each = value if isinstance(value, Sequence) else (value,)
        if any(number < least for number in each):
            raise ValueError(f"{field.name}={value!r}; give {least} or more")


def check_horizontal(horizontal: bool, causal: bool) -> None:
    """Raises ValueError if global rows are asked for where later keys are not seen."""
    if horizontal and causal:
        raise ValueError(
            "horizontal_global_attention=True needs attention='bidirectional': "
            "its rows see what is after them"
        )


def check_ranges(starts: Sequence[int], ends: Sequence[int] | None) -> None:
    """Raises ValueError unless each start has an end after it."""
    if ends is None:
        return
    if len(starts) != len(ends) or np.any(np.greater_equal(starts, ends)):
        raise ValueError(
            f"global_block_indices={starts} and global_block_end_indices={ends} should "
            "be of one length, each end after its start"
        )
