"""What the GPU compiler writes about a kernel, read: its report and machine code."""

import collections
import dataclasses
import re
from collections.abc import Sequence

TENSOR_CORE = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA")
"""Mnemonics, of warpgroups and of warps: 16-bit, 8-bit float and 8-bit integers."""

_LABEL = re.compile(r"\s*(\.L_[\w.]+):")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
# The address, perhaps a predicate, the mnemonic, the operands.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")


@dataclasses.dataclass(frozen=True)
class Report:
    """ptxas' own figures of a kernel, per thread.

    Attributes:
        registers: as compiled; warps that exchange some take no more on average.
        spill_bytes: stored for want of registers.
    """

    registers: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Code:
    """Machine code of a kernel.

    Attributes:
        instructions: mnemonics with their modifiers, in order.
        loop: those of the innermost loop with a tensor core instruction; empty if
            there is none.
    """

    instructions: Sequence[str]
    loop: Sequence[str]

    @property
    def mix(self) -> dict[str, int]:
        """How often each mnemonic is in the inner loop, most frequent first."""
        names = collections.Counter(name.partition(".")[0] for name in self.loop)
        return dict(names.most_common())

    @property
    def tensor_core(self) -> list[str]:
        """Which of the tensor core's mnemonics are in the kernel."""
        found = {name.partition(".")[0] for name in self.instructions}
        return [name for name in TENSOR_CORE if name in found]


def parse_report(text: str) -> Report:
    """The report of `ptxas -v` on one kernel.

    Raises:
        ValueError: it is not laid out as expected.
    """
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores", text)
    if registers is None or spills is None:
        raise ValueError("no registers and spills in the report of ptxas")
    return Report(int(registers[1]), int(spills[1]))


def parse_code(text: str) -> Code:
    """A listing of nvdisasm, of one kernel.

    Raises:
        ValueError: there is no instruction in it.
    """
    instructions: list[str] = []
    targets: list[str | None] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            name, operands = found.groups()
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            instructions.append(name)
            targets.append(target[1] if target else None)
    if not instructions:
        raise ValueError("no instruction in the listing of the machine code")
    bodies = [
        instructions[labels[target] : place + 1]
        for place, target in enumerate(targets)
        if target in labels and labels[target] <= place
    ]
    bodies = [body for body in bodies if _uses_tensor_core(body)]
    return Code(instructions, min(bodies, key=len, default=[]))


def parse_shared_memory(text: str) -> int:
    """Bytes of dynamic shared memory of the launch, from the log of the passes.

    Raises:
        ValueError: there is no launch in it.
    """
    found = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", text)
    if found is None:
        raise ValueError("no launch with shared memory in the log of the passes")
    return int(found[1])


def _uses_tensor_core(body: Sequence[str]) -> bool:
    return any(name.partition(".")[0] in TENSOR_CORE for name in body)
