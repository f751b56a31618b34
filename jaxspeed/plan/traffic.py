"""What a compiled step sends: its collectives, counted from the optimized program.

Every collective is counted as often as it runs (loop trip counts multiplied in), once
however many instructions its asynchronous form has, and over the mesh axes that it
spans. Bytes are what one device sends with the bandwidth-optimal algorithm, the figure
that the ZeRO papers use: (n-1)/n of the payload for an all-gather, a reduce-scatter or
an all-to-all of n devices, twice that for an all-reduce. The payload is that of the
optimized program, which a backend may have widened (CPU sends bfloat16 as float32 and
int4 as int8) or padded. What kernels send by remote copies of their own is not in it.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxspeed.plan import groups, hlo, loops

_OPS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# A TPU fusion that computes while a collective is in flight repeats the instruction
# and takes the flags of the running transfer as parameters, from this one on; the
# fusion that starts the transfer has -1.
_CONTINUED = r'async_collective_fusion_config\\?":\{\\?"flag_start\\?":\\?"(\d+)'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, all its executions together.

    Attributes:
        op: `all-gather`, `all-reduce`, `all-to-all`, `collective-broadcast`,
            `collective-permute`, `ragged-all-to-all` or `reduce-scatter`.
        axes: the mesh axes over which it communicates, in mesh order;
            `("irregular",)` if its groups differ in their axes.
        group_size: devices that take part in one group, 2 for a permute.
        count: executions in one run of the program.
        payload_bytes: size of the whole array, once: of the result for all-gather,
            of the operands otherwise (the bound on them for ragged-all-to-all).
        bytes_sent: what one device sends in all `count` executions; the busiest
            device where they differ (the ends of a permute that is not a ring).
        operands: element type and dims of each operand.
        source: `file:line op_name` as far as the program tells.
        trip_count_known: False inside a loop whose trip count could not be derived;
            such a loop counts as one iteration.
        conditional: True in a branch that may not be taken. Of the branches of a
            conditional only the one that sends most is counted.
    """

    op: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    payload_bytes: int
    bytes_sent: int
    operands: tuple[hlo.Shape, ...]
    source: str
    trip_count_known: bool = True
    conditional: bool = False


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
    text = program if isinstance(program, str) else program.as_text()
    module = hlo.parse(text or "")
    num_devices = module.num_partitions * module.num_replicas
    if num_devices != mesh.size:
        raise ValueError(
            f"the program runs on {num_devices} devices, the mesh {dict(mesh.shape)} "
            f"has {mesh.size}; pass the mesh that the program was compiled for"
        )
    entry = loops.Scope(module, module.computations[module.entry])
    return list(_executed(entry, _Frequency(), mesh.shape))


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
class _Frequency:
    """How often a computation runs, and how sure that is."""

    count: int = 1
    trip_count_known: bool = True
    conditional: bool = False

    def times(self, trips: int | None) -> "_Frequency":
        if trips is None:
            return dataclasses.replace(self, trip_count_known=False)
        return dataclasses.replace(self, count=self.count * trips)


def _executed(
    scope: loops.Scope, frequency: _Frequency, axes: Mapping[str, int]
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
        elif collective := _collective(scope, instruction, frequency, axes):
            yield collective
        else:
            for name in instruction.called:
                callee = scope.call(name, instruction.operands)
                yield from _executed(callee, frequency, axes)


def _largest_branch(
    scope: loops.Scope,
    instruction: hlo.Instruction,
    frequency: _Frequency,
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


def _collective(
    scope: loops.Scope,
    instruction: hlo.Instruction,
    frequency: _Frequency,
    axes: Mapping[str, int],
) -> Collective | None:
    """What `instruction` sends, or None if it is no collective or sends nothing."""
    op = _operation(scope.computation, instruction)
    if op is None or instruction.attribute(_CONTINUED) is not None:
        return None
    names, sizes = tuple(axes), tuple(axes.values())
    num_devices = scope.module.num_partitions * scope.module.num_replicas
    if op == "collective-permute":
        pairs = groups.source_target_pairs(instruction)
        moved = tuple(pair for pair in pairs if pair[0] != pair[1])
        spanned = groups.shifted_axes(moved, names, sizes)
        group_size = 2 if moved else 1
    else:
        members = groups.replica_groups(instruction, num_devices)
        spanned = groups.spanned_axes(members, names, sizes)
        group_size = max(len(group) for group in members)
    if group_size == 1:
        return None
    operands = _operand_shapes(scope.computation, instruction, op)
    payload = sum(shape.bytes for shape in operands)
    if op == "all-gather":
        payload *= group_size
    return Collective(
        op=op,
        axes=spanned,
        group_size=group_size,
        count=frequency.count,
        payload_bytes=payload,
        bytes_sent=_bytes_sent(op, payload * frequency.count, group_size),
        operands=operands,
        source=scope.module.source(instruction),
        trip_count_known=frequency.trip_count_known,
        conditional=frequency.conditional,
    )


def _operation(
    computation: hlo.Computation, instruction: hlo.Instruction
) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "send" and "source_target_pairs=" in instruction.attributes:
        return "collective-permute"  # GPU programs may split one into send and recv
    if opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        # A TPU fusion of this name keeps one shard of the sum, and sends only that.
        return "reduce-scatter"
    return opcode if opcode in _OPS else None


def _operand_shapes(
    computation: hlo.Computation, instruction: hlo.Instruction, op: str
) -> tuple[hlo.Shape, ...]:
    """The arrays that are sent, without tokens, offsets and output buffers."""
    operands = [computation.instructions[name] for name in instruction.operands]
    slices = instruction.attribute(r"\bslice_sizes=\{(\{[\d,{}]*\})\}")
    if slices is not None:  # an in-place permute sends slices of its first operand
        (buffer,) = operands[0].shapes
        sizes = re.findall(r"\{([\d,]+)\}", slices)
        return tuple(
            hlo.Shape(buffer.dtype, tuple(map(int, each.split(",")))) for each in sizes
        )
    if op == "ragged-all-to-all":
        operands = operands[:1]
    shapes = (shape for operand in operands for shape in operand.shapes)
    return tuple(shape for shape in shapes if shape.dtype != "token")


def _bytes_sent(op: str, payload: int, group_size: int) -> int:
    """Bytes that one of `group_size` devices sends; a fraction is rounded up."""
    if op in ("collective-permute", "collective-broadcast"):
        return payload
    rounds = 2 if op == "all-reduce" else 1
    return -(-rounds * payload * (group_size - 1) // group_size)
