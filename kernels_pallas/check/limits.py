"""Counts that a kernel should not exceed, stored beside the code.

Another version of a compiler schedules otherwise: a limit binds the compiler that it
was stored with, and is only mentioned for any other.
"""

import importlib.metadata
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from kernels_pallas.check.chips import CHIPS
from kernels_pallas.check.result import Result

FILE = pathlib.Path(__file__).with_name("limits.json")

GATED = ("cycles", "spills", "loop_instructions", "spill_bytes")
"""Figures with a limit; the fewer the better."""

TOLERANCE = 1.05

Limits = dict[str, Any]
"""`limits[kernel][case][chip]`: the compiler, and figures by name."""


def load(file: pathlib.Path = FILE) -> Limits:
    """The stored limits; none where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def store(results: Iterable[Result], file: pathlib.Path = FILE) -> int:
    """Makes the figures of compiled cases their limits; how many cases that were."""
    limits, count = load(file), 0
    for result in results:
        figures = {x: y for x, y in result.figures.items() if x in GATED}
        if figures:
            case = limits.setdefault(result.kernel, {}).setdefault(result.case, {})
            case[result.chip] = {"compiler": compiler(result.chip), **figures}
            count += 1
    file.write_text(json.dumps(limits, indent=1, sort_keys=True) + "\n")
    return count


def excess(result: Result, limits: Limits) -> str:
    """Which figures exceed their limit by more than 5%, and "" if none does.

    A case without a limit exceeds it, unless nothing was counted.
    """
    figures = {x: y for x, y in result.figures.items() if x in GATED}
    stored = limits.get(result.kernel, {}).get(result.case, {}).get(result.chip)
    if not figures:
        return ""
    if stored is None:
        return "no limit stored: see --store"
    if stored["compiler"] != compiler(result.chip):
        return ""
    above = [
        f"{name} {figures[name]} over the limit of {limit}"
        for name, limit in stored.items()
        if name in figures and figures[name] > limit * TOLERANCE
    ]
    return ", ".join(above)


def other_compiler(result: Result, limits: Limits) -> str:
    """The compiler whose limit a result was not held to, or ""."""
    stored = limits.get(result.kernel, {}).get(result.case, {}).get(result.chip)
    if not stored or not result.figures:
        return ""
    return stored["compiler"] if stored["compiler"] != compiler(result.chip) else ""


def compiler(chip: str) -> str:
    """Versions of what compiles for a chip."""
    packages = {"tpu": ("jax", "libtpu"), "gpu": ("jax", "jax-cuda13-plugin")}
    names = packages[CHIPS[chip].platform]
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
