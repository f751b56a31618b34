"""What is in device memory when a program needs the most, and what made it.

XLA packs the temporary values of a program into one pool: each value has an offset, a
size and the span of the schedule in which it is alive. Values that share bytes at one
time are names for one buffer (a loop's state and its parts, in-place updates). Both are
read from the compiler's own account (`plan.compiler`), so the figures are those that
the compiler goes by when it accepts or refuses a program.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxspeed.plan import hlo, origins

_ALLOCATION = re.compile(
    r"allocation \d+: size (\d+)(?:, color (\d+))?(?:, page \d+)?, (.*):"
)
_VALUE = re.compile(
    r" value: <\d+ (?P<name>[^ {]+)(?P<index>\{[\d,]*\})?(?: \(phi\))? @\d+> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<type>.*)"
)
_SPAN = re.compile(r" {4}([^ {]+)(\{[\d,]*\}):(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One piece of device memory.

    Attributes:
        kind: `parameter`, `temporary`, `constant` or `output`.
        bytes: with the padding of its layout.
        shape: element type and dims.
        name: of the instruction that makes it.
        source: the program's argument, or `file:line op_name` of what made it, as far
            as known.
    """

    kind: str
    bytes: int
    shape: str
    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory of one program, on one device.

    Attributes:
        reserved_bytes: all that is set aside for a run: arguments, outputs that reuse
            none of them, constants and the pool. What the compiler checks.
        pool_bytes: the part of it in which temporary values come and go.
        peak_bytes: the most that is in use at one time; the rest is fragmentation.
            `memory_analysis().peak_memory_in_bytes` on a TPU counts memory on the chip
            as well.
        buffers: in use at that time, the largest first.
    """

    reserved_bytes: int
    pool_bytes: int
    peak_bytes: int
    buffers: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    name: str
    index: str
    size: int
    offset: int
    type: str


@dataclasses.dataclass(frozen=True)
class _Allocation:
    size: int
    kind: str
    values: list[_Value]


def memory(module: hlo.Module, assignment: str, live_ranges: str) -> Memory:
    """Reads the compiler's account of a program's memory.

    Args:
        module: the program.
        assignment, live_ranges: as in `compiler.Compilation`.

    Raises:
        ValueError: the account is empty or not in the form that is known.
    """
    allocations = _allocations(assignment)
    if not allocations:
        raise ValueError(
            "the compiler wrote no buffer assignment (xla_dump_to), so that what lies "
            "in memory is not known"
        )
    spans = _spans(live_ranges)
    pools = [each for each in allocations if each.kind == "temporary"]
    fixed = [each for each in allocations if each.kind not in ("temporary", "scratch")]
    values = [value for pool in pools for value in pool.values]
    used, alive = _fullest(values, spans)
    find = origins.Origins(module)
    buffers = [_buffer("temporary", group, find) for group in _apart(alive)]
    for each in fixed:
        if each.values:
            named = [v for v in each.values if find.is_argument(v.name)] or each.values
            buffers.append(_buffer(each.kind, named[:1], find, each.size))
    return Memory(
        reserved_bytes=sum(each.size for each in allocations),
        pool_bytes=sum(pool.size for pool in pools),
        peak_bytes=used + sum(each.size for each in fixed),
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
    )


def _allocations(text: str) -> list[_Allocation]:
    """The allocations in device memory; other memories (on-chip, host) have a color."""
    found: list[_Allocation] = []
    values: list[_Value] = []
    for line in text.splitlines():
        if head := _ALLOCATION.match(line):
            values = []
            if head[2] in (None, "0"):
                found.append(_Allocation(int(head[1]), _kind(head[3]), values))
        elif value := _VALUE.match(line):
            size, offset = int(value["size"]), int(value["offset"])
            index = value["index"] or "{}"
            values.append(_Value(value["name"], index, size, offset, value["type"]))
    return found


def _kind(words: str) -> str:
    if words.startswith("parameter"):
        return "parameter"
    if words.startswith("constant"):
        return "constant"
    if words.startswith("thread-local"):
        return "scratch"
    return "temporary" if words.startswith("preallocated-temp") else "output"


def _spans(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """First and last moment of each value, by name and index."""
    return {
        (name, index): (int(first), int(last))
        for name, index, first, last in _SPAN.findall(text)
    }


def _fullest(
    values: list[_Value], spans: Mapping[tuple[str, str], tuple[int, int]]
) -> tuple[int, list[_Value]]:
    """The most bytes of the pool in use at one time, and the values alive then."""
    known = [value for value in values if (value.name, value.index) in spans]
    known.sort(key=lambda value: value.offset)
    if not known:
        return 0, []
    offsets = np.array([value.offset for value in known])
    ends = offsets + np.array([value.size for value in known])
    moments = [spans[value.name, value.index] for value in known]
    first, last = np.array(moments).T

    def used(alive: np.ndarray) -> int:
        starts, reached = offsets[alive], np.maximum.accumulate(ends[alive])
        before = np.concatenate([[0], reached[:-1]])
        return int(np.maximum(0, reached - np.maximum(starts, before)).sum())

    # Use only grows where a value begins.
    best = max(np.unique(first), key=lambda now: used((first <= now) & (last >= now)))
    alive = (first <= best) & (last >= best)
    return used(alive), [known[index] for index in np.flatnonzero(alive)]


def _apart(alive: Iterable[_Value]) -> list[list[_Value]]:
    """Values, in order of offsets, in groups that share bytes."""
    groups: list[list[_Value]] = []
    end = 0
    for value in alive:
        if not value.size:
            continue
        if not groups or value.offset >= end:
            groups.append([])
        groups[-1].append(value)
        end = max(end, value.offset + value.size)
    return groups


def _buffer(
    kind: str, values: list[_Value], find: origins.Origins, size: int | None = None
) -> Buffer:
    """One buffer of values that share its bytes: the largest that has a source."""
    if size is None:
        start = min(value.offset for value in values)
        size = max(value.offset + value.size for value in values) - start
    best = max(values, key=lambda v: (v.size, bool(find.source(v.name, v.index))))
    shape = re.sub(r"\{.*", "", best.type)
    return Buffer(kind, size, shape, best.name, find.source(best.name, best.index))
