"""Reads a trace: how long the devices computed, waited for each other, and idled."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

_ACCELERATOR = re.compile(r"/device:(?:TPU|GPU):(\d+)$")
_COLLECTIVE = re.compile(
    r"(all-?gather|all-?reduce|reduce-?scatter|all-?to-?all|collective-?permute"
    r"|collective-?broadcast|send|recv|nccl|nvshmem)",
    re.IGNORECASE,
)

Interval = tuple[float, float]
"""Start and end in nanoseconds."""


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Shares of the traced time, the mean over devices; they add up to 1.

    Attributes:
        compute: a kernel or operation that is no collective runs.
        collectives: only a collective runs: communication that nothing hides.
        idle: nothing runs.
        devices: number of devices in the trace.
    """

    compute: float
    collectives: float
    idle: float
    devices: int


@dataclasses.dataclass
class _Busy:
    """What ran on one device."""

    compute: list[Interval] = dataclasses.field(default_factory=list)
    collectives: list[Interval] = dataclasses.field(default_factory=list)


def newest_trace(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest file that `jax.profiler` wrote below `folder`; None if there is none.

    Its events for Perfetto are beside it, in a file that ends on `.trace.json.gz`.
    """
    traces = folder.glob("plugins/profile/*/*.xplane.pb")
    return max(traces, key=lambda path: path.stat().st_mtime, default=None)


def device_time(trace: pathlib.Path) -> DeviceTime | None:
    """How the devices spent the time of a trace; None if it shows no operation.

    TPUs write one line of operations, in which waiting for an asynchronous collective
    is its `done`; GPUs one line per stream; simulated devices their threads, where a
    collective is an operation in which a rendezvous takes place.

    Args:
        trace: an `.xplane.pb` file.
    """
    devices: dict[int, _Busy] = {}
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        accelerator = _ACCELERATOR.search(plane.name)
        if accelerator:
            busy = devices.setdefault(int(accelerator.group(1)), _Busy())
            for line in plane.lines:
                if line.name == "XLA Ops" or line.name.startswith("Stream"):
                    _accelerator_line(line.events, busy)
        elif plane.name == "/host:CPU":
            for line in plane.lines:
                _thread(line.events, devices)
    shares = [_shares(busy) for busy in devices.values() if _spans(busy)]
    if not shares:
        return None
    means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    return DeviceTime(*means, devices=len(shares))


def _accelerator_line(events: Iterable[Any], busy: _Busy) -> None:
    for event, is_leaf in _nested(events):
        if is_leaf:
            # "%all-reduce.1 = f32[...] ...": only the name is the operation's own.
            name = event.name.partition(" = ")[0]
            kind = busy.collectives if _COLLECTIVE.search(name) else busy.compute
            kind.append((event.start_ns, event.end_ns))


def _nested(events: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Events of a line, and whether no other lies within (a loop holds its body)."""
    ordered = sorted(events, key=lambda event: (event.start_ns, -event.end_ns))
    for event, following in zip(ordered, [*ordered[1:], None], strict=True):
        yield event, following is None or following.start_ns >= event.end_ns


def _thread(events: Iterable[Any], devices: dict[int, _Busy]) -> None:
    operations, meetings = [], []
    for event in events:
        if event.name == "Rendezvous":
            meetings.append(event.start_ns)
        elif not event.name.startswith(("end: ", "Threadpool", "Wait")):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                operations.append((event, int(stats.get("device_ordinal", 0))))
    meetings.sort(reverse=True)
    for event, device in sorted(operations, key=lambda pair: pair[0].start_ns):
        while meetings and meetings[-1] < event.start_ns:
            meetings.pop()
        meets = meetings and meetings[-1] < event.end_ns
        busy = devices.setdefault(device, _Busy())
        kind = busy.collectives if meets else busy.compute
        kind.append((event.start_ns, event.end_ns))


def _spans(busy: _Busy) -> list[Interval]:
    return busy.compute + busy.collectives


def _shares(busy: _Busy) -> tuple[float, float, float]:
    """Compute, collectives alone, and idle, as shares of first start to last end."""
    spans = _spans(busy)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    compute, active = _length(busy.compute), _length(spans)
    whole = max(whole, 1.0)
    return compute / whole, (active - compute) / whole, 1 - active / whole


def _length(intervals: list[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
