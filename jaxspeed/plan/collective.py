"""One collective of a compiled program: what it sends, and over which mesh axes.

The bytes are what one device sends with the bandwidth-optimal algorithm: (n-1)/n of the
payload for an all-gather, a reduce-scatter or an all-to-all of n devices, twice that
for an all-reduce.
"""

import dataclasses
import re
from collections.abc import Mapping

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
_ASYNC_FUSION = r'async_collective_fusion_config\\?":\{'
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
        asynchronous: True if the device can compute while it runs.
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
    asynchronous: bool = False

    def bytes_of(self, count: int) -> int:
        """Bytes that one device sends in `count` executions."""
        return _bytes_sent(self.op, self.payload_bytes * count, self.group_size)


def collective_of(
    scope: loops.Scope, instruction: hlo.Instruction, axes: Mapping[str, int]
) -> Collective | None:
    """One execution of a collective.

    Args:
        scope: where the instruction stands.
        instruction: any instruction of it.
        axes: sizes of the mesh axes by name, in mesh order.

    Returns:
        None if it is no collective, or sends nothing, or only waits for one that was
        started before.
    """
    op = _operation(scope.computation, instruction)
    if op is None or is_continued(instruction):
        return None
    names, sizes = tuple(axes), tuple(axes.values())
    members = members_of(scope, instruction, op)
    if op == "collective-permute":
        spanned = groups.shifted_axes(members, names, sizes)
        group_size = 2 if members else 1
    else:
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
        count=1,
        payload_bytes=payload,
        bytes_sent=_bytes_sent(op, payload, group_size),
        operands=operands,
        source=scope.module.source(instruction),
        asynchronous=_is_asynchronous(instruction),
    )


def members_of(
    scope: loops.Scope, instruction: hlo.Instruction, op: str
) -> groups.Groups:
    """Devices of each group of a collective; of a permute, pairs of different ones."""
    if op == "collective-permute":
        pairs = groups.source_target_pairs(instruction)
        return tuple(pair for pair in pairs if pair[0] != pair[1])
    num_devices = scope.module.num_partitions * scope.module.num_replicas
    return groups.replica_groups(instruction, num_devices)


def is_continued(instruction: hlo.Instruction) -> bool:
    """Whether it carries on a collective that an earlier TPU fusion started."""
    return instruction.attribute(_CONTINUED) is not None


def _is_asynchronous(instruction: hlo.Instruction) -> bool:
    if instruction.opcode == "send" or instruction.attribute(f"({_ASYNC_FUSION})"):
        return True
    # GPU programs write synchronous collectives as a start, too.
    synchronous = re.search(r'"is_sync":\s*true', instruction.attributes)
    return instruction.opcode.endswith("-start") and not synchronous


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
