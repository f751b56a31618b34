"""Results as text: a table per platform, and what is to be said beside it."""

from collections.abc import Sequence
from typing import Any

from kernels_pallas.check import limits as limits_
from kernels_pallas.check.chips import CHIPS
from kernels_pallas.check.result import Result

COLUMNS = {
    "tpu": {
        "cycles": "cycles",
        "hbm_cycles": "HBM cycles",
        "cycles_per_64k": "cycles/64Ki",
        "mxu": "MXU",
        "spills": "spills",
        "vmem_bytes": "VMEM KiB",
    },
    "gpu": {
        "instructions_per_weight": "instr/weight",
        "loop_instructions": "loop instr",
        "registers": "registers",
        "spill_bytes": "spills B",
        "shared_bytes": "shared KiB",
        "tensor_core": "tensor core",
    },
}
"""Headings by the name of the figure."""


def table(results: Sequence[Result], platform: str) -> str:
    """The results of one platform's chips, in columns; "" if there are none."""
    mine = [x for x in results if CHIPS[x.chip].platform == platform]
    if not mine:
        return ""
    columns = COLUMNS[platform]
    rows = [["kernel", "case", "chip", "", *columns.values()]]
    for x in sorted(mine, key=lambda x: (x.kernel, x.case, list(CHIPS).index(x.chip))):
        cells = [_cell(name, x.figures.get(name)) for name in columns]
        rows.append([x.kernel, x.case, x.chip, x.status, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def remarks(results: Sequence[Result], limits: limits_.Limits) -> list[str]:
    """Why cases did not compile or were not counted, and which exceed their limit."""
    found = []
    for x in results:
        where = f"{x.kernel}, {x.case}, {x.chip}"
        if x.reason:
            found.append(f"{where}: {x.status}: {x.reason}")
        if above := limits_.excess(x, limits):
            found.append(f"{where}: {above}")
    others = {limits_.other_compiler(x, limits) for x in results} - {""}
    found += [f"not held to limits that were stored with {name}" for name in others]
    return found


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, figures to the right."""
    cells = [
        cell.ljust(width) if place < 4 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("vmem_bytes", "shared_bytes"):
        return f"{value / 1024:.0f}"
    if name == "mxu":
        return f"{value:.0%}"
    if isinstance(value, list):
        return " ".join(value) or "none"
    return f"{value:.2f}" if name == "instructions_per_weight" else f"{value:.0f}"
