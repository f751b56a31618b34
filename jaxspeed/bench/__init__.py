"""Measurements behind every figure in the README: `jaxspeed bench NAME`.

A bench compares within one interleaved run and reports medians and ratios.
"""

from collections.abc import Callable
from typing import Any

from jaxspeed.bench import (
    engine,
    estimate,
    formats,
    overlap,
    pods,
    resume,
    traffic,
    zero,
)

BENCHES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "engine": engine.run,
    "estimate": estimate.run,
    "formats": formats.run,
    "overlap": overlap.run,
    "pods": pods.run,
    "zero": zero.run,
    "resume": resume.run,
    "traffic": traffic.run,
}
"""Every bench by name; each returns the rows of its table."""

OF_RUNS: dict[str, Callable[[str], list[dict[str, Any]]]] = {"formats": formats.run}
"""Those that also measure a run that is there, given its folder."""
