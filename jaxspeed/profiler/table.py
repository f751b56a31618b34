"""A tree of counts as text."""

import math
from collections.abc import Iterator

from jaxspeed.profiler.modules import ModuleCount
from jaxspeed.profiler.operations import Figures

_COLUMNS = (
    "module",
    "params",
    "FLOPs forward",
    "backward",
    "share",
    "MACs",
    "elementwise",
    "bytes",
)


def table(count: ModuleCount, depth: int | None = None) -> str:
    """The table of a count: a line for each module, its parts indented below it.

    Args:
        count: what `count` returned.
        depth: levels of parts to show; None for all, 0 for the whole alone.

    Raises:
        ValueError: a negative depth.
    """
    if depth is not None and depth < 0:
        raise ValueError(f"depth is {depth}; give 0 or more, or None for all levels")
    limit = math.inf if depth is None else depth
    rows = [_COLUMNS, *_rows(count, "total", 0, limit, count.flops)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"not counted: {what}" for what in count.unknown]
    return "\n".join(lines) + "\n"


def quantity(value: float) -> str:
    """A number with three digits and a prefix: 1.23 M."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {prefix}" if value < 1e18 else f"{value:.3g}"
    return f"{value:.3g}"


def _rows(
    count: ModuleCount, name: str, level: int, limit: float, whole: int
) -> Iterator[tuple[str, ...]]:
    yield _row("  " * level + name, count.params, count.forward, count.backward, whole)
    if level >= limit or not count.children:
        return
    for child in count.children:
        yield from _rows(child, child.name, level + 1, limit, whole)
    forward = _rest(count.forward, [child.forward for child in count.children])
    backward = _rest(count.backward, [child.backward for child in count.children])
    params = count.params - sum(child.params for child in count.children)
    if params or forward.flops or backward.flops or forward.bytes or backward.bytes:
        label = "  " * (level + 1) + "(in no part)"
        yield _row(label, params, forward, backward, whole)


def _rest(whole: Figures, parts: list[Figures]) -> Figures:
    return whole + sum(parts, Figures()).times(-1)


def _row(
    name: str, params: int, forward: Figures, backward: Figures, whole: int
) -> tuple[str, ...]:
    total = forward + backward
    return (
        name,
        quantity(params),
        quantity(forward.flops),
        quantity(backward.flops),
        f"{total.flops / whole:.1%}" if whole else "-",
        quantity(total.macs),
        quantity(total.elementwise),
        quantity(total.bytes),
    )
