"""What a compiled step sends: its collectives, counted from the optimized program.

Every collective is counted as often as it runs (loop trip counts multiplied in), once
however many instructions its asynchronous form has, and over the mesh axes that it
spans. Bytes are what one device sends with the bandwidth-optimal algorithm, the figure
that the ZeRO papers use: (n-1)/n of the payload for an all-gather, a reduce-scatter or
an all-to-all of n devices, twice that for an all-reduce. The payload is that of the
optimized program, which a backend may have widened (CPU sends bfloat16 as float32 and
int4 as int8) or padded. What Pallas kernels send by remote copies of their own is not
in it: the program does not tell, except for the total that a kernel's cost estimate may
claim (`plan.flops(...).remote_bytes`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxspeed.plan import hlo, loops
from jaxspeed.plan.collective import Collective, collective_of
from jaxspeed.plan.text import text_of


def collectives(
    program: jax.stages.Compiled | str, mesh: Mesh | AbstractMesh
) -> list[Collective]:
    """The collectives of a compiled program, in program order.

    Groups of one device send nothing and are left out.

    Args:
        program: `jax.jit(f).lower(...).compile()`, or its text, `.as_text()`.
        mesh: the mesh that the program was compiled for; the program numbers devices
            by their position in it.

    Raises:
        ValueError: this is not one optimized program, or it runs on another number of
            devices than the mesh has, or it has a collective whose form is not known
            (nothing is skipped silently).
    """
    module = hlo.parse(text_of(program))
    check_devices(module, mesh)
    entry = loops.Scope(module, module.computations[module.entry])
    return list(executed(entry, mesh.shape))


def check_devices(module: hlo.Module, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless the program runs on as many devices as the mesh has."""
    num_devices = module.num_partitions * module.num_replicas
    if num_devices != mesh.size:
        raise ValueError(
            f"the program runs on {num_devices} devices, the mesh {dict(mesh.shape)} "
            f"has {mesh.size}; pass the mesh that the program was compiled for"
        )


def executed(scope: loops.Scope, axes: Mapping[str, int]) -> Iterator[Collective]:
    """The collectives that run when `scope` does once, in program order.

    Args:
        scope: a computation of the program.
        axes: sizes of the mesh axes by name, in mesh order.
    """
    return _executed(scope, Frequency(), axes)


def summarise(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Totals per kind of collective and set of axes, the most bytes first.

    Returns:
        `{"op", "axes", "count", "bytes_per_step"}` each; bytes are those that one
        device sends.
    """
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for each in found:
        total = totals.setdefault((each.op, each.axes), [0, 0])
        total[0] += each.count
        total[1] += each.bytes_sent
    rows = [
        {"op": op, "axes": list(axes), "count": count, "bytes_per_step": sent}
        for (op, axes), (count, sent) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes_per_step"])


def bytes_by_axis(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes that one device sends over each mesh axis.

    A collective over several axes at once is one entry, `data+seq`: how its bytes
    divide is the runtime's choice. The values add up to all that the device sends.
    """
    totals: dict[str, int] = {}
    for each in found:
        key = "+".join(each.axes)
        totals[key] = totals.get(key, 0) + each.bytes_sent
    return totals


@dataclasses.dataclass(frozen=True)
class Frequency:
    """How often a computation runs in one run of the program, and how sure that is.

    Attributes:
        count: executions, the product of the trip counts of the loops around it.
        trip_count_known: False if one of these is not known and counts as one.
        conditional: whether it is in a branch that may not be taken.
        asynchronous: whether it runs beside the main computation.
    """

    count: int = 1
    trip_count_known: bool = True
    conditional: bool = False
    asynchronous: bool = False

    def times(self, trips: int | None) -> "Frequency":
        """Of the body of a loop in it."""
        if trips is None:
            return dataclasses.replace(self, trip_count_known=False)
        return dataclasses.replace(self, count=self.count * trips)


def _executed(
    scope: loops.Scope, frequency: Frequency, axes: Mapping[str, int]
) -> Iterator[Collective]:
    """The collectives that run when `scope` does, those it calls included."""
    for instruction in scope.computation.instructions.values():
        opcode = instruction.opcode
        if opcode.endswith(("-done", "-update")):
            continue  # its start was counted
        if opcode == "while":
            trips = loops.trip_count(scope, instruction)
            condition, body = loops.condition_and_body(instruction)
            # Once more than the body, to leave the loop.
            tests = None if trips is None else trips + 1
            for name, runs in ((condition, tests), (body, trips)):
                inner = scope.iterate(name, instruction)
                yield from _executed(inner, frequency.times(runs), axes)
        elif opcode == "conditional":
            yield from _largest_branch(scope, instruction, frequency, axes)
        elif found := collective_of(scope, instruction, axes):
            yield dataclasses.replace(
                found,
                count=frequency.count,
                bytes_sent=found.bytes_of(frequency.count),
                trip_count_known=frequency.trip_count_known,
                conditional=frequency.conditional,
                asynchronous=found.asynchronous or frequency.asynchronous,
            )
        else:
            inside = frequency
            if opcode in ("async-start", "call-start"):
                inside = dataclasses.replace(frequency, asynchronous=True)
            for name in instruction.called:
                callee = scope.call(name, instruction.operands)
                yield from _executed(callee, inside, axes)


def _largest_branch(
    scope: loops.Scope,
    instruction: hlo.Instruction,
    frequency: Frequency,
    axes: Mapping[str, int],
) -> list[Collective]:
    maybe = dataclasses.replace(frequency, conditional=True)
    branches = [
        list(_executed(scope.call(name, (operand,)), maybe, axes))
        for name, operand in zip(
            instruction.called, instruction.operands[1:], strict=True
        )
    ]
    return max(branches, key=lambda branch: sum(each.bytes_sent for each in branch))
