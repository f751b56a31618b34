"""What the TPU compiler writes about its final schedule, read.

The format is undocumented; seen from libtpu 0.0.42 to 0.0.51.
"""

import dataclasses
import json
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's instructions, cycle by cycle; a loop's body counts once.

    Attributes:
        cycles: bundles, delays included, waits for memory not.
        used: for each unit ("MXU", "VALU", "VSTORE:SPILL", ...) how many of its slots
            are filled, over all cycles.
        capacity: how many slots it has in one cycle.
    """

    cycles: int
    used: Mapping[str, int]
    capacity: Mapping[str, int]

    @property
    def spills(self) -> int:
        """Vector registers stored to memory for want of registers."""
        return self.used.get("VSTORE:SPILL", 0)


def parse_schedule(text: str) -> Schedule:
    """A `*-pre-delay_hlo-static-per-bundle-utilization.txt`.

    Raises:
        ValueError: it is not laid out as expected.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = [name.strip() for name in lines[1].split(",")]
        capacity = _numbers(lines[2], len(names))
        rows = [_numbers(line, len(names)) for line in lines[4:]]
    except (IndexError, ValueError) as error:
        raise ValueError(f"not a table of a schedule's units: {error}") from error
    if not rows:
        raise ValueError("a table of a schedule's units without a row")
    used = [sum(column) for column in zip(*rows, strict=True)]
    return Schedule(
        len(rows),
        dict(zip(names, used, strict=True)),
        dict(zip(names, capacity, strict=True)),
    )


def parse_vmem(text: str) -> dict[str, int]:
    """Bytes of VMEM of each HLO instruction, from a `*-vmem_report.html`.

    Raises:
        ValueError: it is not laid out as expected.
    """
    start = re.search(r"const DATA\s*=\s*", text)
    if start is None:
        raise ValueError("no data in the report of VMEM")
    data, _ = json.JSONDecoder().raw_decode(text, start.end())
    try:
        breakdown = data["hlo_breakdowns"]
        return {name: int(row["total_size"]) for name, row in breakdown.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"no sizes in the report of VMEM: {error}") from error


def kernel_names(hlo: str) -> list[str]:
    """The HLO instructions that are Pallas kernels, in a compiled program's text."""
    line = r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\""
    return re.findall(rf"^\s*(?:ROOT )?{line}", hlo, re.MULTILINE)


def _numbers(line: str, count: int) -> list[int]:
    numbers = [int(word) for word in line.split()]
    if len(numbers) != count:
        raise ValueError(f"{count} units and {len(numbers)} figures")
    return numbers
