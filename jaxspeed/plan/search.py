"""Finds how to run a model: mesh, ZeRO stage, remat policy, micro-batch, accumulation.

The formulas of `estimate` weigh every candidate in a second; those that cannot fit, and
those that another beats in both memory and time, drop out. The compiler then decides
among the best few. DeepSpeed's autotuner runs each of its experiments on the cluster;
this one needs no hardware.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from jaxspeed.chips import CHIPS, Chip
from jaxspeed.config import Config
from jaxspeed.plan import cache, pareto
from jaxspeed.plan.candidates import Candidate, candidates
from jaxspeed.plan.report import report
from jaxspeed.plan.topology import num_devices

GB = 1e9
MOST_COMPILED = 6
"""Candidates that the compiler is asked about, more only until one fits."""

DOUBT = 1.3
"""A candidate is compiled unless its estimate exceeds the memory by this factor."""

NEAR = 0.05
"""Candidates this close to each other by estimate are left to the compiler."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A candidate and what its compiler said.

    Attributes:
        candidate: with the estimate.
        chip: what it is judged by.
        found: `plan.Report.as_json()`; None if the compiler failed.
        problem: why it failed, for another reason than memory.
        cached: found in the cache, not compiled now.
    """

    candidate: Candidate
    chip: Chip
    found: dict[str, Any] | None
    problem: str | None = None
    cached: bool = False

    @property
    def bytes(self) -> int:
        """Device memory that the program reserves; by estimate if it failed."""
        if self.found is None:
            return self.candidate.estimate.total_bytes
        return self.found["per_device"]["reserved_bytes"]

    @property
    def fits(self) -> bool:
        """Whether the compiler took it and the chip holds it."""
        return (
            self.found is not None
            and self.found["fits"]
            and self.bytes <= self.chip.usable_hbm_bytes
        )

    @property
    def seconds(self) -> float:
        """A step by the compiled timeline; by estimate where there is none."""
        timed = self.found.get("step_seconds") if self.found else None
        return timed or self.candidate.estimate.expected_seconds or math.inf

    @property
    def limit(self) -> str:
        """What bounds it: `capacity`, `compute`, `memory` or `network`."""
        if not self.fits:
            return "capacity" if self.found is not None else "compiler"
        times = self.found["roofline_seconds"] if self.found else {}
        if not times or None in times.values():
            return self.candidate.estimate.limit or "unknown"
        return max(times, key=lambda name: times[name])

    def as_json(self) -> dict[str, Any]:
        """The point as JSON types; bytes are per device."""
        estimate, config = self.candidate.estimate, self.candidate.config
        return {
            "mesh": dict(estimate.mesh),
            "zero_stage": config.zero.stage,
            "remat": config.remat,
            "sequences_per_device": estimate.sequences,
            "accumulation": config.batch.accumulation,
            "estimated_bytes": estimate.total_bytes,
            "bytes": self.bytes,
            "fits": self.fits,
            "estimated_seconds": estimate.expected_seconds,
            "seconds": self.seconds,
            "limit": self.limit,
            "mfu_bound": self.found and self.found.get("mfu_bound"),
            "compile_seconds": self.found and self.found["compile_seconds"],
            "cached": self.cached,
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        topology, global_batch, chip: what it was for.
        points: the candidates that were compiled, the best first.
        front: those that fit and that no other beats in both memory and time.
        considered: candidates weighed by formula.
        too_large, dominated: how many of them dropped out, and why.
        left: the shortlist's candidates that were not compiled.
        out_of_time: some were left because the time budget did not allow them.
        seconds: the search took.
    """

    topology: str
    global_batch: int
    chip: Chip
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    considered: int
    too_large: int
    dominated: int
    left: tuple[Candidate, ...]
    out_of_time: bool
    seconds: float

    @property
    def best(self) -> Point | None:
        """The fastest that fits; of equally fast ones the smallest."""
        return self.front[0] if self.front else None

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        best = self.best
        return {
            "topology": self.topology,
            "global_batch": self.global_batch,
            "chip": self.chip.name,
            "usable_hbm_bytes": self.chip.usable_hbm_bytes,
            "best": best and best.as_json(),
            "front": [point.as_json() for point in self.front],
            "points": [point.as_json() for point in self.points],
            "considered": self.considered,
            "too_large": self.too_large,
            "dominated": self.dominated,
            "left": [candidate.name for candidate in self.left],
            "out_of_time": self.out_of_time,
            "seconds": self.seconds,
        }


def search(
    config: Config,
    topology: str,
    *,
    global_batch: int,
    time_budget: float = 600.0,
    chip: Chip | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Search:
    """The best ways to run `config` on `topology`.

    What was compiled is kept (`plan.cache`), so a second call goes on where the first
    ran out of time.

    Args:
        config: mesh, ZeRO stage, remat policy and batch are chosen, the rest stays.
        topology: as for `plan.report`.
        global_batch: sequences in a step, on all devices together.
        time_budget: seconds. A compile that is likely to end later is not begun, by
            the longest so far; the first one always is.
        chip: what to judge by; the topology's own by default.
        say: prints a line for the user.

    Raises:
        ValueError: an unknown topology, or one whose chip is not known; a batch that
            no mesh divides; nothing fits, by formula: says what comes closest.
    """
    start = time.monotonic()
    count = num_devices(topology)
    chip = chip or _chip_of(topology)
    every = candidates(config, count, chip, global_batch=global_batch)
    possible = [each for each in every if _weight(each, chip) <= DOUBT]
    if not possible:
        raise ValueError(_nothing_fits(every, topology, chip))
    short = pareto.front(possible, _costs, slack=NEAR)
    short.sort(key=lambda each: (each.estimate.expected_seconds, _weight(each, chip)))
    say(
        f"{len(every)} candidates, {len(every) - len(possible)} too large, "
        f"{len(possible) - len(short)} dominated: {len(short)} for the compiler"
    )
    trial = _Trial(topology, chip, start + time_budget, say)
    left, out_of_time = trial.run(short)
    points = sorted(trial.points, key=lambda p: (not p.fits, p.seconds, p.bytes))
    fitting = [point for point in points if point.fits]
    return Search(
        topology=topology,
        global_batch=global_batch,
        chip=chip,
        points=tuple(points),
        front=tuple(pareto.front(fitting, lambda p: (p.seconds, p.bytes))),
        considered=len(every),
        too_large=len(every) - len(possible),
        dominated=len(possible) - len(short),
        left=tuple(left),
        out_of_time=out_of_time,
        seconds=time.monotonic() - start,
    )


class _Trial:
    """Compiles candidates one after another, as long as there is time."""

    def __init__(
        self,
        topology: str,
        chip: Chip,
        deadline: float,
        say: Callable[[str], None],
    ) -> None:
        self.points: list[Point] = []
        self._topology, self._chip = topology, chip
        self._deadline, self._say = deadline, say
        self._longest = 0.0
        self._correction = 1.0

    def run(self, short: list[Candidate]) -> tuple[list[Candidate], bool]:
        """Fills `points`; what it left, and whether for lack of time."""
        queue, out_of_time = list(short), False
        total = min(MOST_COMPILED, len(short))
        with tqdm(total=total, desc="compiling", unit="point", disable=None) as bar:
            while queue and not self._enough():
                candidate = self._next(queue)
                found = cache.read(candidate.config, self._topology)
                if found is None and not self._has_time():
                    out_of_time = True
                    break
                queue.remove(candidate)
                self._add(candidate, found)
                bar.update()
        return queue, out_of_time

    def _enough(self) -> bool:
        fitting = any(point.fits for point in self.points)
        return len(self.points) >= MOST_COMPILED and fitting

    def _has_time(self) -> bool:
        return time.monotonic() + self._longest < self._deadline or not self._longest

    def _next(self, queue: list[Candidate]) -> Candidate:
        """The first that should fit, by what compiled programs needed beyond theirs."""
        usable = self._chip.usable_hbm_bytes
        return next(
            (
                each
                for each in queue
                if each.estimate.total_bytes * self._correction <= usable
            ),
            min(queue, key=lambda each: each.estimate.total_bytes),
        )

    def _add(self, candidate: Candidate, found: dict[str, Any] | None) -> None:
        cached, problem = found is not None, None
        start = time.monotonic()
        if found is None:
            try:
                found = report(candidate.config, self._topology).as_json()
            except jax.errors.JaxRuntimeError as error:
                problem = str(error).strip().partition("\n")[0]
            else:
                found["wall_seconds"] = time.monotonic() - start
                cache.write(candidate.config, self._topology, found)
        took = found["wall_seconds"] if found else time.monotonic() - start
        self._longest = max(self._longest, took)
        point = Point(candidate, self._chip, found, problem, cached)
        self.points.append(point)
        if found is not None:
            ratio = point.bytes / candidate.estimate.total_bytes
            self._correction = max(self._correction, ratio)
        self._say(_line(point, took))


def _line(point: Point, took: float) -> str:
    """One compiled point, for the user."""
    answer = f"{point.bytes / GB:.1f} GB, {point.seconds:.3g} s, {point.limit}"
    if point.problem:
        answer = f"the compiler failed: {point.problem}"
    elif not point.fits:
        answer = f"{point.bytes / GB:.1f} GB, too large"
    where = "cached" if point.cached else f"{took:.0f} s"
    return f"{point.candidate.name}: {answer} ({where})"


def _chip_of(topology: str) -> Chip:
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"the speed and the memory of {topology} are not known, so nothing can be "
            f"chosen for it; give a chip to judge by, one of {sorted(CHIPS)}"
        )
    return CHIPS[name]


def _weight(candidate: Candidate, chip: Chip) -> float:
    """The estimated bytes as a fraction of what the chip has."""
    return candidate.estimate.total_bytes / chip.usable_hbm_bytes


def _costs(candidate: Candidate) -> tuple[float, float]:
    estimate = candidate.estimate
    return estimate.total_bytes, estimate.expected_seconds or math.inf


def _nothing_fits(every: list[Candidate], topology: str, chip: Chip) -> str:
    closest = min(every, key=lambda each: each.estimate.total_bytes)
    need, have = closest.estimate.total_bytes, chip.usable_hbm_bytes
    state = closest.estimate.state_bytes
    return (
        f"nothing fits on {topology}: the closest of {len(every)} candidates, "
        f"{closest.name}, needs {need / GB:.1f} GB per device ({state / GB:.1f} GB of "
        f"it state) and a {chip.name} has {have / GB:.1f} GB: "
        f"{(need - have) / GB:.1f} GB are missing. Use more devices, shorter sequences "
        "or a smaller model"
    )
